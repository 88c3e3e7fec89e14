"""The one table of weight names: Megatron's on the left, Hugging Face's on the right.

Megatron stacks the layers of one kind in one tensor with a leading layer axis, whatever the layout
of the run that wrote it, under Transformer Engine's names: a norm's weight is stored with the
linear layer behind it. Hugging Face has a tensor for each layer; `*` stands for its number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from megatron_mlr1.errors import CheckpointError

Layout = Literal["whole", "qkv", "gate_up", "vocabulary"]
"""How the Hugging Face tensors lie in Megatron's; `tensors.py` says what each word means."""


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron weight and the Hugging Face weights that it holds, in their order."""

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str, ...]
    """Shape of each Hugging Face weight, a letter for each dimension: V tokens, N width of the
    model, F width of the MLP, Q width of all query heads, K width of all key or value heads."""
    layout: Layout = "whole"

    @property
    def is_layered(self) -> bool:
        """Tell whether there is one for each layer."""
        return "*" in self.hf[0]

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        """Give the Hugging Face names for one layer, or for the model where there are no layers."""
        return tuple(name.replace("*", str(layer)) for name in self.hf)


_LAYER: Final = "model.layers.*."
ROWS: Final = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("VN",), "vocabulary"),
    Row(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (_LAYER + "input_layernorm.weight",),
        ("N",),
    ),
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            _LAYER + "self_attn.q_proj.weight",
            _LAYER + "self_attn.k_proj.weight",
            _LAYER + "self_attn.v_proj.weight",
        ),
        ("QN", "KN", "KN"),
        "qkv",
    ),
    Row(
        "decoder.layers.self_attention.linear_proj.weight",
        (_LAYER + "self_attn.o_proj.weight",),
        ("NQ",),
    ),
    Row(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        (_LAYER + "post_attention_layernorm.weight",),
        ("N",),
    ),
    Row(
        "decoder.layers.mlp.linear_fc1.weight",
        (_LAYER + "feed_forward.gate_proj.weight", _LAYER + "feed_forward.up_proj.weight"),
        ("FN", "FN"),
        "gate_up",
    ),
    Row(
        "decoder.layers.mlp.linear_fc2.weight",
        (_LAYER + "feed_forward.down_proj.weight",),
        ("NF",),
    ),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("N",)),
)
BY_MEGATRON: Final = {row.megatron: row for row in ROWS}

TIED_HEAD: Final = ("lm_head.weight", "model.embed_tokens.weight")
"""The output head and what it is tied to: one weight, stored once."""

EMPTY_STATES: Final = (
    "decoder.layers.self_attention.linear_qkv._extra_state",
    "decoder.layers.self_attention.linear_proj._extra_state",
    "decoder.layers.mlp.linear_fc1._extra_state",
    "decoder.layers.mlp.linear_fc2._extra_state",
    "decoder.final_layernorm._extra_state",
)
"""Entries that hold no weight, but without which one or the other implementation will not load."""


@dataclass(frozen=True, slots=True)
class Place:
    """One weight of Megatron's model: a row, and the layer where the row has layers."""

    row: Row
    layer: int | None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Give the Hugging Face names of what lies here."""
        return self.row.hf_names(self.layer)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.row.megatron}{layer}"


def places(num_layers: int) -> Iterator[Place]:
    """Walk through a model from the embedding to the final norm, layer by layer."""
    layered = [row for row in ROWS if row.is_layered]
    first, last = (row for row in ROWS if not row.is_layered)
    yield Place(first, None)
    for layer in range(num_layers):
        yield from (Place(row, layer) for row in layered)
    yield Place(last, None)


def check_hf_names(found: set[str], num_layers: int, *, where: str) -> None:
    """Check that a Hugging Face model has exactly the weights of the table.

    Raises:
        CheckpointError: names a weight without a row, or a missing one.
    """
    expected = {name for place in places(num_layers) for name in place.hf_names}
    _check(found - {TIED_HEAD[0]}, expected, where=where)


def check_megatron_names(found: set[str], *, where: str) -> None:
    """Check that a Megatron model has exactly the weights of the table.

    Raises:
        CheckpointError: names a weight without a row, or a missing one.
    """
    _check(found, set(BY_MEGATRON), where=where)


def _check(found: set[str], expected: set[str], *, where: str) -> None:
    for name in sorted(found - expected):
        raise CheckpointError(
            f"{where}: weight {name} has no row in checkpoint/names.py, so nobody knows where it "
            "belongs. Convert a MobileLLM-R1 without added weights, or add a row for it."
        )
    for name in sorted(expected - found):
        raise CheckpointError(
            f"{where}: weight {name} is missing. The checkpoint must have every weight of its "
            "architecture; was it saved or copied whole?"
        )
