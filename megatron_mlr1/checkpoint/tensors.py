"""How the tensors of one side lie in those of the other, and which shapes they must have.

Dimensions: V tokens, P >= V rows of the padded embedding, N width of the model, F width of the
MLP, H query heads, G key and value heads, D width of a head.

=========== ==================================== ============================================
layout      Hugging Face                         Megatron
=========== ==================================== ============================================
whole       one tensor                           the same
vocabulary  [V, N]                               [P, N]; rows from V on belong to no token
gate_up     gate [F, N], up [F, N]               [2F, N]: gate above up
qkv         q [H*D, N], k [G*D, N], v [G*D, N]   [(H+2G)*D, N]: for each of the G groups its H/G
                                                 query heads, its key head, its value head
=========== ==================================== ============================================
"""

import torch
from torch import Tensor

from megatron_mlr1.checkpoint.names import Place, Row
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape


def hf_shapes(row: Row, shape: ModelShape) -> tuple[tuple[int, ...], ...]:
    """Give the shapes of a row's Hugging Face tensors, in their order."""
    sizes = {
        "V": shape.vocab_size,
        "N": shape.hidden_size,
        "F": shape.ffn_hidden_size,
        "Q": shape.num_attention_heads * shape.kv_channels,
        "K": shape.num_query_groups * shape.kv_channels,
    }
    return tuple(tuple(sizes[letter] for letter in dims) for dims in row.dims)


def megatron_shape(row: Row, shape: ModelShape) -> tuple[int, ...]:
    """Give the shape of one layer of a row's Megatron tensor, without vocabulary padding."""
    parts = hf_shapes(row, shape)
    return (sum(part[0] for part in parts), *parts[0][1:])


def check_shape(found: tuple[int, ...], expected: tuple[int, ...], *, what: str) -> None:
    """Check a tensor's shape.

    Raises:
        CheckpointError: the shape is another one.
    """
    if found != expected:
        raise CheckpointError(
            f"{what} has shape {list(found)}; by the sizes of its model it must have "
            f"{list(expected)}. Sizes and weights come from different models: take both from one."
        )


def split(place: Place, tensor: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """Take a Megatron weight apart into its Hugging Face tensors, in the order of their names."""
    if place.row.layout == "vocabulary":
        return (tensor[: shape.vocab_size],)
    if place.row.layout == "gate_up":
        return tensor.chunk(2, dim=0)
    if place.row.layout == "qkv":
        parts = torch.split(_by_group(tensor, shape), _group_rows(shape), dim=1)
        return tuple(part.flatten(0, 1) for part in parts)
    return (tensor,)


def merge(place: Place, tensors: tuple[Tensor, ...], shape: ModelShape) -> Tensor:
    """Put a Megatron weight together from its Hugging Face tensors; the inverse of `split`."""
    if place.row.layout == "qkv":
        return torch.cat([_by_group(part, shape) for part in tensors], dim=1).flatten(0, 1)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=0)


def _by_group(tensor: Tensor, shape: ModelShape) -> Tensor:
    """View [rows, N] as [G, rows / G, N]."""
    return tensor.view(shape.num_query_groups, -1, tensor.size(1))


def _group_rows(shape: ModelShape) -> list[int]:
    heads = shape.num_attention_heads // shape.num_query_groups
    return [heads * shape.kv_channels, shape.kv_channels, shape.kv_channels]
