"""Cross-entropy of a linear head against whole logits, log-softmax and autograd."""

import pytest
import torch

from megatron_mlr1.ops.cross_entropy_rows import cross_entropy_gradient_, cross_entropy_partials
from megatron_mlr1.ops.head_chunks import Chunks, Shard, Wanted
from megatron_mlr1.ops.linear_cross_entropy import linear_cross_entropy
from tests.support.softmax_losses import case, value_and_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(inputs, **words):
    words = {"shard": Shard(first_id=0, num_ids=inputs.num_ids)} | words
    return linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels, inputs.ce_weight, **words
    )


def outputs(result):
    return result.total, result.gradients.hidden, result.gradients.weight


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 7, 64, None])
def test_value_and_gradients_are_the_definitions_in_chunks_of_any_size(size, z_loss):
    inputs = case()
    result = run(inputs, chunks=Chunks(size=size), z_loss=z_loss)
    expected = value_and_gradients(inputs, z_loss=z_loss)
    for got, want in zip(outputs(result), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_padded_ids_take_no_probability_and_get_no_gradient():
    inputs = case(padding=9)
    inputs.weight[inputs.num_ids :] = 1e3
    result = run(inputs)
    assert torch.isfinite(result.total)
    assert not result.gradients.weight[inputs.num_ids :].any()
    exact = torch.nn.functional.cross_entropy(
        inputs.hidden @ inputs.weight[: inputs.num_ids].T, inputs.labels, reduction="none"
    )
    torch.testing.assert_close(result.losses, exact)


def test_tokens_that_are_left_out_change_nothing():
    inputs = case()
    rows = inputs.ce_weight.nonzero()[:, 0]
    assert len(rows) < len(inputs.labels)
    inputs.hidden[inputs.ce_weight == 0] = float("nan")
    inputs.labels[inputs.ce_weight == 0] = -100
    result = run(inputs, chunks=Chunks(rows=rows, size=5))
    inputs.hidden[inputs.ce_weight == 0] = 0
    inputs.labels[inputs.ce_weight == 0] = 0
    for got, want in zip(outputs(result), value_and_gradients(inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not result.losses[inputs.ce_weight == 0].any()


def test_a_batch_in_which_nothing_counts_is_zero():
    inputs = case()
    none = torch.empty(0, dtype=torch.int64)
    result = run(inputs, chunks=Chunks(rows=none))
    assert all(not value.any() for value in outputs(result))


def test_an_evaluation_has_the_same_losses_and_no_gradients():
    inputs = case()
    result = run(inputs, wanted=Wanted(hidden=False, weight=False))
    assert result.gradients.hidden is None
    assert result.gradients.weight is None
    assert torch.equal(result.losses, run(inputs).losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_only_read_and_results_are_fp32_and_repeat_bit_by_bit(dtype):
    inputs = case(tokens=40, ids=301)
    hidden, weight = inputs.hidden.to(dtype), inputs.weight.to(dtype)
    before = hidden.clone(), weight.clone()
    args = (hidden, weight, inputs.labels, inputs.ce_weight.float())
    shard = Shard(first_id=0, num_ids=inputs.num_ids)
    results = [linear_cross_entropy(*args, shard=shard, chunks=Chunks(size=16)) for _ in range(2)]
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])
    for first, second in zip(*(outputs(result) for result in results), strict=True):
        assert first.dtype == torch.float32
        assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_inputs_lose_no_digits_to_bf16_logits(device):
    inputs = case(tokens=64, ids=2000, width=64)
    hidden, weight = inputs.hidden.bfloat16().to(device), inputs.weight.bfloat16().to(device)
    labels = inputs.labels.to(device)
    shard = Shard(first_id=0, num_ids=inputs.num_ids)
    result = linear_cross_entropy(
        hidden, weight, labels, torch.ones(64, device=device), shard=shard
    )
    z = hidden.double() @ weight[: inputs.num_ids].double().T
    exact = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    rounded = torch.nn.functional.cross_entropy(z.bfloat16().double(), labels, reduction="none")
    error = (result.losses - exact).abs().max()
    assert error < 2e-5
    assert error < (rounded - exact).abs().max() / 100


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_give_finite_losses_and_gradients(device):
    inputs = case()
    hidden, weight = (1e4 * inputs.hidden).float().to(device), inputs.weight.float().to(device)
    result = linear_cross_entropy(
        hidden, weight, inputs.labels.to(device), inputs.ce_weight.float().to(device)
    )
    assert all(torch.isfinite(value).all() for value in outputs(result))


def test_not_a_number_stays_visible():
    inputs = case()
    inputs.hidden[1] = float("nan")
    result = run(inputs)
    assert result.losses[1].isnan()
    assert result.total.isnan()


def test_gradients_sum_to_zero_over_the_vocabulary():
    inputs = case(tokens=9)
    z = torch.randn(9, 50, dtype=torch.float64)
    weight, label = inputs.ce_weight[:9], inputs.labels[:9] % 50
    partials = cross_entropy_partials(z, label)
    lse = partials[0] + partials[1].log()
    cross_entropy_gradient_(z, label, lse, weight, weight)
    assert z.sum(1).abs().max() < 1e-15


def test_a_shard_without_ids_says_that_it_has_nothing():
    partials = cross_entropy_partials(torch.empty(4, 0), torch.full((4,), -1))
    assert partials.tolist() == [[float("-inf")] * 4, [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("device", DEVICES)
def test_its_rows_are_ops_that_torch_can_trace(device):
    z = torch.randn(5, 33, device=device)
    label = torch.tensor([0, 32, -1, 4, 4], device=device)
    row = torch.rand(5, device=device)
    torch.library.opcheck(torch.ops.mlr1.cross_entropy_partials.default, (z, label))
    gradient = torch.ops.mlr1.cross_entropy_gradient_.default
    torch.library.opcheck(gradient, (z, label, row, row, row))
