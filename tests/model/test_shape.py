"""Parameters and FLOPs of the published sizes."""

import pytest

from megatron_mlr1.model.shape import named_shape


@pytest.mark.parametrize(
    ("size", "count"), [("140m", 140_248_512), ("360m", 359_431_168), ("950m", 949_685_760)]
)
def test_parameters_are_those_of_the_published_models(size, count):
    assert named_shape(size).num_parameters() == count


@pytest.mark.parametrize(
    ("size", "length", "gflops"),
    [
        # 3 x (2 x weights of all linear layers and the head + 4 x S/2 x heads x 64 x layers)
        ("140m", 2048, 0.9476),
        ("140m", 32768, 2.5401),
        ("360m", 2048, 2.3451),
        ("360m", 4096, 2.5339),
        ("950m", 2048, 6.1129),
        ("950m", 4096, 6.5282),
        ("950m", 32768, 12.3415),
    ],
)
def test_training_flops_per_token_count_causal_attention_and_the_head(size, length, gflops):
    flops = named_shape(size).training_flops(tokens=length, sum_squared_lengths=length**2) / length
    assert flops / 1e9 == pytest.approx(gflops, abs=5e-5)


def test_masked_documents_cost_less_attention():
    shape = named_shape("950m")
    whole = shape.attention_flops(4096**2)
    halves = shape.attention_flops(2 * 2048**2)
    assert halves == whole / 2
