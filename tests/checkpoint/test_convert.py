"""Both conversions, on checkpoints that each side's own library wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mlr1.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_mlr1.checkpoint.megatron import MegatronCheckpoint
from megatron_mlr1.checkpoint.names import places
from megatron_mlr1.checkpoint.shards import SINGLE
from megatron_mlr1.errors import CheckpointError

Run = tuple[Path, dict[str, torch.Tensor]]
MakeFolder = Callable[..., Path]


def weights(folder: Path) -> dict[str, bytes]:
    """Read every tensor's bytes, type and shape."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
    return found  # type: ignore[return-value]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_run_becomes_a_folder_that_transformers_loads_whole(
    run: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    report = megatron_to_hf(run[0], tmp_path / "hf", tokenizer=tokenizer_folder, verify=True)
    assert report.difference is not None
    assert report.difference.relative < 1e-5
    assert report.source.name == "iter_0000005"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids(
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_weights_land_where_their_names_say(
    run: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    root, saved = run
    megatron_to_hf(root, tmp_path / "hf", tokenizer=tokenizer_folder)
    found = load_file(tmp_path / "hf" / SINGLE)
    assert torch.equal(
        found["model.embed_tokens.weight"], saved["embedding.word_embeddings.weight"][:300]
    )
    layer, q = "decoder.layers.1.", "model.layers.1."
    qkv = saved[layer + "self_attention.linear_qkv.weight"]
    # Two groups of two query heads, a key head and a value head, each 8 rows.
    assert torch.equal(found[q + "self_attn.q_proj.weight"], torch.cat([qkv[0:16], qkv[32:48]]))
    assert torch.equal(found[q + "self_attn.k_proj.weight"], torch.cat([qkv[16:24], qkv[48:56]]))
    assert torch.equal(found[q + "self_attn.v_proj.weight"], torch.cat([qkv[24:32], qkv[56:64]]))
    fc1 = saved[layer + "mlp.linear_fc1.weight"]
    assert torch.equal(found[q + "feed_forward.gate_proj.weight"], fc1[:24])
    assert torch.equal(found[q + "feed_forward.up_proj.weight"], fc1[24:])
    norm = saved[layer + "pre_mlp_layernorm.weight"]
    assert torch.equal(found[q + "post_attention_layernorm.weight"], norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hugging_face_to_megatron_and_back_gives_the_same_bytes(
    hf_folder: MakeFolder, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = hf_folder(dtype=dtype, max_shard_bytes=20_000)
    assert len(list(source.glob("*.safetensors"))) > 1
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=dtype)
    assert weights(tmp_path / "back") == weights(source)
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_megatron_to_hugging_face_and_back_gives_the_same_bytes(
    run: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    megatron_to_hf(run[0], tmp_path / "hf", tokenizer=tokenizer_folder)
    report = hf_to_megatron(tmp_path / "hf", tmp_path / "back", verify=True)
    assert report.difference is not None
    before, after = (MegatronCheckpoint(root, None) for root in (run[0], tmp_path / "back"))
    assert after.tokenizer == tmp_path / "hf"
    assert after.architecture(300) == before.architecture(300)
    for place in places(2):
        old, new = before.reader.read(place), after.reader.read(place)
        assert torch.equal(old[:300] if place.layer is None else old, new), place


def test_bf16_weights_are_the_rounded_ones(
    run: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    for name, dtype in (("full", torch.float32), ("half", torch.bfloat16)):
        report = megatron_to_hf(
            run[0], tmp_path / name, tokenizer=tokenizer_folder, dtype=dtype, verify=True
        )
        assert report.difference is not None
    full, half = (load_file(tmp_path / name / SINGLE) for name in ("full", "half"))
    assert {name: tensor.bfloat16() for name, tensor in full.items()}.keys() == half.keys()
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in half)


def test_an_older_iteration_can_be_named(run: Run, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = megatron_to_hf(run[0], tmp_path / "hf", iteration=3, tokenizer=tokenizer_folder)
    assert report.source.name == "iter_0000003"
    embedding = load_file(tmp_path / "hf" / SINGLE)["model.embed_tokens.weight"]
    assert not torch.equal(embedding, run[1]["embedding.word_embeddings.weight"][:300])


def test_without_a_tokenizer_padding_cannot_be_told_from_tokens(run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 320 rows, padding included.*--tokenizer"):
        megatron_to_hf(run[0], tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_output_is_refused_unless_it_may_be_replaced(
    hf_folder: MakeFolder, tmp_path: Path
) -> None:
    source, target = hf_folder(), tmp_path / "megatron"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        hf_to_megatron(source, target)
    hf_to_megatron(source, target, overwrite=True)
    assert not (target / "precious").exists()
    assert leftovers(tmp_path) == []


def test_the_output_cannot_be_what_is_being_read(hf_folder: MakeFolder) -> None:
    source = hf_folder()
    for target in (source, source.parent):
        with pytest.raises(CheckpointError, match="being read"):
            hf_to_megatron(source, target, overwrite=True)
    assert (source / SINGLE).is_file()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [truncated, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_safetensors_shard_stops_the_conversion(
    hf_folder: MakeFolder, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    source = hf_folder(max_shard_bytes=20_000)
    harm(source / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        hf_to_megatron(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("harm", [truncated, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_distcp_shard_stops_the_conversion(
    run: Run, tokenizer_folder: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    harm(tmp_path / "run/iter_0000005/__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is (missing|truncated)"):
        megatron_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damage_found_half_way_leaves_nothing(
    run: Run, tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    shard = tmp_path / "run/iter_0000005/__0_0.distcp"
    whole = shard.read_bytes()
    # The weights stand at the end; the length stays, so only reading can find this.
    shard.write_bytes(whole[: len(whole) - 5000] + bytes(5000))
    with pytest.raises(CheckpointError, match=r"cannot be read.*damaged"):
        megatron_to_hf(tmp_path / "run", tmp_path / "hf", tokenizer=tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.self_attn.q_norm.weight", (8,), "q_norm.weight has no row"),
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.norm.weight", (17,), r"has shape \[17\].*must have \[16\]"),
        ("lm_head.weight", (300, 16), "lm_head.weight differs"),
    ],
)
def test_wrong_weights_are_named(
    hf_folder: MakeFolder,
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...] | None,
    message: str,
) -> None:
    source = hf_folder()
    tensors = load_file(source / SINGLE)
    tensors.pop(name, None)
    if shape:
        tensors[name] = torch.ones(shape)
    save_file(tensors, source / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        hf_to_megatron(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_head_that_is_the_embedding_is_no_other_weight(
    hf_folder: MakeFolder, tmp_path: Path
) -> None:
    source = hf_folder()
    tensors = load_file(source / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / SINGLE)
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert "lm_head.weight" not in load_file(tmp_path / "back" / SINGLE)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    hf_folder: MakeFolder, tokenizer_folder: Path, tmp_path: Path
) -> None:
    hf_to_megatron(hf_folder(), tmp_path / "megatron")
    larger = tmp_path / "larger"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<|one|>"])
    tokenizer.save_pretrained(larger)
    with pytest.raises(CheckpointError, match="300 rows, but the vocabulary has 301"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer=larger)


def test_another_epsilon_is_verified_too(hf_folder: MakeFolder, tmp_path: Path) -> None:
    source = hf_folder()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report = hf_to_megatron(source, tmp_path / "megatron", verify=True)
    assert report.difference is not None
    assert report.difference.relative < 1e-4
