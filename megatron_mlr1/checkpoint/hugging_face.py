"""A Hugging Face folder's config: written as the published one, read from all that say the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from megatron_mlr1.checkpoint.architecture import (
    MISSING,
    Architecture,
    check_fields,
    integer,
    number,
)
from megatron_mlr1.checkpoint.folder import write_text
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

TRANSFORMERS_VERSION: Final = "4.55.0"
"""The version that the published models name; older ones do not know the architecture's fields."""

_PUBLISHED: Final[dict[str, Any]] = {
    "architectures": ["Llama4ForCausalLM"],
    "attention_bias": False,
    "attention_chunk_size": 32768,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": False,
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 0,
    "intermediate_size": 8192,
    "model_type": "llama4_text",
    "moe_layers": [],
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": True,
    "transformers_version": TRANSFORMERS_VERSION,
    "use_cache": True,
    "use_qk_norm": True,
}
"""What all published configs have in common: config.json of facebook/MobileLLM-R1-140M."""

_REQUIRED: Final[dict[str, tuple[object, ...]]] = {
    "model_type": ("llama4_text",),
    "use_qk_norm": (True,),
    "attention_bias": (False, MISSING),
    "hidden_act": ("silu", MISSING),
    "rope_scaling": (None, MISSING),
    "tie_word_embeddings": (True,),
    # Absent, it would mean a mixture of experts in every layer.
    "moe_layers": ([],),
    "quantization_config": (None, MISSING),
}
_DTYPE_WORDS: Final = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Where a text begins and what ends one."""

    bos: int | None
    eos: int | list[int] | None


LLAMA_3_IDS: Final = TokenIds(bos=128000, eos=[128001, 128008, 128009])
LLAMA_3_VOCABULARY: Final = 128256


def config(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Give the fields of `config.json`, those of the published models and no others."""
    shape = architecture.shape
    fields = _PUBLISHED | {
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": shape.kv_channels,
        "hidden_size": shape.hidden_size,
        "intermediate_size_mlp": shape.ffn_hidden_size,
        "layer_types": ["full_attention"] * shape.num_layers,
        "max_position_embeddings": architecture.max_positions,
        # In spite of its name: 1 means that the layer has rotary embeddings.
        "no_rope_layers": [1] * shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rotary_base,
        "torch_dtype": _DTYPE_WORDS[dtype],
        "vocab_size": shape.vocab_size,
    }
    return dict(sorted(fields.items()))


def generation_config(ids: TokenIds) -> dict[str, Any]:
    """Give the fields of `generation_config.json` as published; ids that are not known stay out."""
    fields = {
        "_from_model_config": True,
        "bos_token_id": ids.bos,
        "cache_implementation": "dynamic",
        "eos_token_id": ids.eos,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    return {name: value for name, value in fields.items() if value is not None}


def write_configs(
    folder: Path, architecture: Architecture, ids: TokenIds, dtype: torch.dtype
) -> None:
    """Write `config.json` and `generation_config.json`."""
    for name, fields in (
        ("config.json", config(architecture, ids, dtype)),
        ("generation_config.json", generation_config(ids)),
    ):
        write_text(folder / name, json.dumps(fields, indent=2) + "\n")


def read_architecture(folder: Path) -> Architecture:
    """Read `config.json`.

    Raises:
        CheckpointError: there is none, or it is another architecture's.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); --load must be a Hugging Face model folder. Name "
            "the folder that holds config.json and the weights."
        ) from error
    where = str(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} holds no fields; it must be a JSON object. Copy it again.")
    fields, rotary_base = _rotary(fields, where)
    check_fields(fields, _REQUIRED, where=where)
    num_layers = integer(fields, "num_hidden_layers", where=where)
    max_positions = integer(fields, "max_position_embeddings", where=where)
    _check_layers(fields, num_layers, max_positions, where)
    return Architecture(
        shape=_shape(fields, num_layers, where),
        rotary_base=rotary_base,
        max_positions=max_positions,
        norm_epsilon=number(fields, "rms_norm_eps", where=where),
    )


def _rotary(fields: dict[str, Any], where: str) -> tuple[dict[str, Any], float]:
    """Read the rotary base, which transformers 5 keeps with the scaling in `rope_parameters`."""
    parameters = fields.get("rope_parameters")
    if not isinstance(parameters, dict):
        return fields, number(fields, "rope_theta", where=where)
    check_fields(parameters, {"rope_type": ("default", MISSING)}, where=f"{where}: rope_parameters")
    without = {name: value for name, value in fields.items() if name != "rope_scaling"}
    return without, number(parameters, "rope_theta", where=where)


def _check_layers(
    fields: Mapping[str, Any], num_layers: int, max_positions: int, where: str
) -> None:
    """Check that every layer has rotary embeddings and sees the whole sequence."""
    rotary = fields.get("no_rope_layers")
    # One known config of a published size lists more layers than it has.
    if not isinstance(rotary, list) or len(rotary) < num_layers or set(rotary) != {1}:
        raise CheckpointError(
            f"{where}: unknown architecture: no_rope_layers is {rotary!r}; a MobileLLM-R1 has 1 "
            f"for each of its {num_layers} layers. Only models of this architecture can be "
            "converted."
        )
    kinds = fields.get("layer_types") or ["chunked_attention"]
    chunk = fields.get("attention_chunk_size")
    is_whole = isinstance(chunk, int) and chunk >= max_positions
    allowed = {"full_attention"} | ({"chunked_attention"} if is_whole else set())
    if not set(kinds) <= allowed:
        raise CheckpointError(
            f"{where}: unknown architecture: layer_types is {kinds!r} with attention_chunk_size "
            f"{chunk!r}; every layer of a MobileLLM-R1 sees all {max_positions} positions. Only "
            "models of this architecture can be converted."
        )


def _shape(fields: Mapping[str, Any], num_layers: int, where: str) -> ModelShape:
    hidden_size = integer(fields, "hidden_size", where=where)
    num_heads = integer(fields, "num_attention_heads", where=where)
    num_groups = integer(fields, "num_key_value_heads", where=where)
    if num_heads % num_groups:
        raise CheckpointError(
            f"{where}: num_attention_heads is {num_heads} and num_key_value_heads {num_groups}; "
            "the second must divide the first. Was the file edited?"
        )
    has_head_dim = fields.get("head_dim") is not None
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=integer(fields, "intermediate_size_mlp", where=where),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        kv_channels=integer(fields, "head_dim", where=where)
        if has_head_dim
        else hidden_size // num_heads,
        vocab_size=integer(fields, "vocab_size", where=where),
    )
