"""Taking weights apart and putting them together are inverse to each other."""

import pytest
import torch

from megatron_mlr1.checkpoint.names import places
from megatron_mlr1.checkpoint.tensors import check_shape, hf_shapes, megatron_shape, merge, split
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

SHAPES = [
    ModelShape(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        vocab_size=11,
    )
    for heads, groups, width in ((4, 2, 4), (9, 3, 2), (5, 1, 6), (3, 3, 8))
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apart_and_together_is_the_identity(shape: ModelShape) -> None:
    for place in places(1):
        tensor = torch.randn(megatron_shape(place.row, shape))
        parts = split(place, tensor, shape)
        assert tuple(tuple(part.shape) for part in parts) == hf_shapes(place.row, shape)
        assert torch.equal(merge(place, parts, shape), tensor)


def test_padding_of_the_vocabulary_is_left_behind() -> None:
    shape, embedding = SHAPES[0], next(places(1))
    padded = torch.randn(16, 16)
    (part,) = split(embedding, padded, shape)
    assert torch.equal(part, padded[:11])


def test_all_shapes_together_have_the_published_number_of_parameters() -> None:
    shape = ModelShape(
        num_layers=15,
        hidden_size=576,
        ffn_hidden_size=2048,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=128256,
    )
    numbers = (torch.Size(megatron_shape(place.row, shape)).numel() for place in places(15))
    assert sum(numbers) == shape.num_parameters() == 140_248_512


def test_a_wrong_shape_is_named() -> None:
    check_shape((2, 3), (2, 3), what="w")
    with pytest.raises(CheckpointError, match=r"w has shape \[2, 3\]; .* must have \[3, 2\]"):
        check_shape((2, 3), (3, 2), what="w")
