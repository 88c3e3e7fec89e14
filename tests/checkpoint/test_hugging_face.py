"""Configs: written as the published one, read from whoever says the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from megatron_mlr1.checkpoint.architecture import Architecture
from megatron_mlr1.checkpoint.hugging_face import (
    LLAMA_3_IDS,
    TokenIds,
    config,
    generation_config,
    read_architecture,
    write_configs,
)
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

PUBLISHED: dict[str, Any] = json.loads(
    Path(__file__).with_name("mobilellm_r1_140m.json").read_text("utf-8")
)
"""config.json and generation_config.json of facebook/MobileLLM-R1-140M."""
R1_140M = Architecture(
    shape=ModelShape(
        num_layers=15,
        hidden_size=576,
        ffn_hidden_size=2048,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=128256,
    ),
    rotary_base=8e6,
    max_positions=32768,
    norm_epsilon=1e-5,
)


def written(folder: Path, architecture: Architecture, **changes: object) -> Path:
    """Write a config with other fields; `...` takes a field out."""
    fields = config(architecture, TokenIds(None, None), torch.float32) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_the_140m_has_its_published_configs(tmp_path: Path) -> None:
    write_configs(tmp_path, R1_140M, LLAMA_3_IDS, torch.float32)
    for name in ("config", "generation_config"):
        found = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        assert found == PUBLISHED[name]
        assert list(found) == sorted(PUBLISHED[name])


def test_the_published_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["config"]))
    assert read_architecture(tmp_path) == R1_140M


def test_unknown_ids_stay_out_of_generation() -> None:
    assert "eos_token_id" not in generation_config(TokenIds(None, None))


def test_what_transformers_saves_again_is_read(tmp_path: Path, architecture: Architecture) -> None:
    fields = config(architecture, TokenIds(1, 2), torch.float32)
    Llama4ForCausalLM(Llama4TextConfig(**fields)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    assert read_architecture(tmp_path) == architecture


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("use_qk_norm", False),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("tie_word_embeddings", False),
        ("moe_layers", [1]),
        ("moe_layers", ...),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("no_rope_layers", [1, 0]),
        ("no_rope_layers", [1]),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_another_architecture_is_refused_by_the_field(
    tmp_path: Path, architecture: Architecture, field: str, value: object
) -> None:
    folder = written(tmp_path, architecture, **{field: value})
    name = "rope_type" if field == "rope_parameters" else field
    with pytest.raises(CheckpointError, match=f"unknown architecture: {name} is"):
        read_architecture(folder)


def test_chunks_as_long_as_the_model_are_whole_attention(
    tmp_path: Path, architecture: Architecture
) -> None:
    chunked = ["chunked_attention"] * 2
    folder = written(tmp_path, architecture, layer_types=chunked, attention_chunk_size=64)
    assert read_architecture(folder) == architecture
    folder = written(tmp_path, architecture, layer_types=chunked, attention_chunk_size=63)
    with pytest.raises(CheckpointError, match="layer_types"):
        read_architecture(folder)


def test_a_list_that_is_longer_than_the_model_is_read(
    tmp_path: Path, architecture: Architecture
) -> None:
    assert (
        read_architecture(written(tmp_path, architecture, no_rope_layers=[1] * 22)) == architecture
    )


def test_heads_without_a_width_share_the_models(tmp_path: Path, architecture: Architecture) -> None:
    read = read_architecture(written(tmp_path, architecture, head_dim=None))
    assert read == replace(architecture, shape=replace(architecture.shape, kv_channels=4))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "16", "hidden_size is '16'"),
        ("vocab_size", ..., "vocab_size is None"),
        ("rope_theta", 0, "rope_theta is 0"),
        ("num_key_value_heads", 3, "must divide"),
    ],
)
def test_sizes_that_are_no_sizes_are_refused(
    tmp_path: Path, architecture: Architecture, field: str, value: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_architecture(written(tmp_path, architecture, **{field: value}))


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=["missing", "broken", "no object"])
def test_a_folder_without_a_config_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_architecture(tmp_path)
