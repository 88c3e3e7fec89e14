"""Our safetensors are the library's, byte for byte, and damaged ones are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mlr1.checkpoint.shards import INDEX, SINGLE, ShardReader, ShardWriter
from megatron_mlr1.errors import CheckpointError


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"b": (3, 5), "a": (7,), "c.weight": (2, 2, 3)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, weights: dict[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    dtype = next(iter(weights.values())).dtype
    with ShardWriter(folder, shapes, dtype, max_shard_bytes=max_shard_bytes) as shards:
        for name, tensor in weights.items():
            shards.write(name, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_file_is_the_librarys_own_byte_for_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = tensors(dtype)
    write(tmp_path, weights)
    save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_weights_are_spread_over_files_with_an_index(tmp_path: Path) -> None:
    weights = tensors()
    write(tmp_path, weights, max_shard_bytes=90)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert {name: file[6:11] for name, file in index["weight_map"].items()} == {
        "a": "00001",
        "b": "00001",
        "c.weight": "00002",
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], weights[name])
    reader = ShardReader(tmp_path)
    assert reader.names == set(weights)
    assert all(torch.equal(reader.read(name), weights[name]) for name in weights)


def test_a_folder_without_safetensors_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="must be safetensors"):
        ShardReader(tmp_path)


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        ShardReader(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    write(tmp_path, tensors(), max_shard_bytes=90)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a is in it only"):
        ShardReader(tmp_path)


def test_weights_of_two_types_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1).bfloat16()}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"several types \(torch.bfloat16, torch.float32\)"):
        assert ShardReader(tmp_path).dtype


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="type I8"):
        ShardReader(tmp_path)
