"""The table of names says one thing in both directions, and nothing outside it passes."""

import pytest

from megatron_mlr1.checkpoint.names import (
    BY_MEGATRON,
    ROWS,
    check_hf_names,
    check_megatron_names,
    places,
)
from megatron_mlr1.errors import CheckpointError


def hf_names(num_layers: int) -> list[str]:
    return [name for place in places(num_layers) for name in place.hf_names]


def test_no_name_stands_twice() -> None:
    assert len(BY_MEGATRON) == len(ROWS)
    assert len(set(hf_names(22))) == len(hf_names(22))


def test_the_950m_has_its_200_published_tensors() -> None:
    names = hf_names(22)
    assert len(names) == 200
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "model.norm.weight"
    assert "model.layers.21.feed_forward.down_proj.weight" in names


def test_exactly_the_table_passes() -> None:
    check_hf_names(set(hf_names(3)), 3, where="here")
    check_hf_names({*hf_names(3), "lm_head.weight"}, 3, where="here")
    check_megatron_names(set(BY_MEGATRON), where="here")


def test_a_weight_without_a_row_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"here: weight model\.layers\.3\..* has no row"):
        check_hf_names(set(hf_names(4)), 3, where="here")
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.mlp\.router\.weight has no row"):
        check_megatron_names({*BY_MEGATRON, "decoder.layers.mlp.router.weight"}, where="here")


def test_a_missing_weight_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        check_hf_names(set(hf_names(3)) - {"model.norm.weight"}, 3, where="here")
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight is missing"):
        check_megatron_names(set(BY_MEGATRON) - {"decoder.final_layernorm.weight"}, where="here")
