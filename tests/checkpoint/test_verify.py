"""The proof passes for the same weights, and fails for weights that are a little different."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mlr1.checkpoint.architecture import Architecture
from megatron_mlr1.checkpoint.convert import hf_to_megatron
from megatron_mlr1.checkpoint.shards import SINGLE
from megatron_mlr1.checkpoint.verify import compare
from megatron_mlr1.errors import CheckpointError


@pytest.fixture
def both(hf_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    folder = hf_folder()
    hf_to_megatron(folder, tmp_path / "megatron")
    return tmp_path / "megatron/release", folder


def test_the_same_weights_agree(both: tuple[Path, Path], architecture: Architecture) -> None:
    assert compare(*both, architecture).relative < 1e-5


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_other_weights_do_not(
    both: tuple[Path, Path], architecture: Architecture, factor: float
) -> None:
    tensors = load_file(both[1] / SINGLE)
    tensors["model.layers.1.feed_forward.up_proj.weight"] *= factor
    save_file(tensors, both[1] / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="largest logit difference"):
        compare(*both, architecture)


def test_a_folder_that_transformers_finds_incomplete_is_refused(
    both: tuple[Path, Path], architecture: Architecture
) -> None:
    tensors = load_file(both[1] / SINGLE)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.ones(1)
    save_file(tensors, both[1] / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: \['model.norm.weight'\]"):
        compare(*both, architecture)
