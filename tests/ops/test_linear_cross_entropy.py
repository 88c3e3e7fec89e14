"""Cross-entropy of a linear head against whole logits, log-softmax and autograd."""

import pytest
import torch

from megatron_mlr1.ops.cross_entropy_rows import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_partials,
)
from megatron_mlr1.ops.head_chunks import Chunks, Shard, Wanted, rows_in
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


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradients_times_a_factor_join_what_is_there(z_loss):
    inputs = case()
    into = torch.ones_like(inputs.weight)
    factor = torch.tensor(3.0, dtype=torch.float64)
    wanted = Wanted(factor=factor, into=into)
    for _ in range(2):
        result = run(inputs, chunks=Chunks(size=7), wanted=wanted, z_loss=z_loss)
    total, to_hidden, to_weight = value_and_gradients(inputs, z_loss=z_loss)
    assert result.gradients.weight is into
    for got, want in zip(outputs(result), (total, 3 * to_hidden, 1 + 6 * to_weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_types_cost_their_rounding_and_nothing_else(dtype, logits, device):
    inputs = case(tokens=64, ids=2000, width=64)
    hidden, weight = (x.to(device, dtype) for x in (inputs.hidden, inputs.weight / 8))
    shard = Shard(first_id=0, num_ids=inputs.num_ids)
    args = (hidden, weight, inputs.labels.to(device), inputs.ce_weight.float().to(device))
    into = torch.full(weight.shape, 1e-4, device=device)
    wanted = Wanted(factor=torch.tensor(1e-4, device=device), into=into)
    chunks = Chunks(size=16, logits=logits)
    result = linear_cross_entropy(*args, shard=shard, chunks=chunks, wanted=wanted)
    z = hidden.double() @ weight[: inputs.num_ids].double().T
    if logits is not None:
        z = z.to(logits).double()
    z.requires_grad_()
    losses = torch.nn.functional.cross_entropy(z, args[2], reduction="none")
    # Where the product of the logits is another one, some round the other way.
    limit = 1e-5 if logits is None else 2e-3
    torch.testing.assert_close(result.losses.double(), losses.detach(), rtol=0, atol=limit)
    (grad,) = torch.autograd.grad((losses * args[3]).sum() * 1e-4, z)
    to_weight = into[: inputs.num_ids].double() - 1e-4
    assert relative(result.gradients.hidden, grad @ weight[: inputs.num_ids].double()) < 5e-3
    assert relative(to_weight, grad.T @ hidden.double()) < 5e-3
    if device == "cuda":
        assert result.gradients.hidden.dtype == dtype


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
    cross_entropy_gradient_(z, label, lse, weight, weight, z.dtype)
    assert z.sum(1).abs().max() < 1e-15


def test_a_shard_without_ids_says_that_it_has_nothing():
    partials = cross_entropy_partials(torch.empty(4, 0), torch.full((4,), -1))
    assert partials.tolist() == [[float("-inf")] * 4, [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_gradient_is_the_wide_one_rounded_once(dtype):
    generator = torch.Generator().manual_seed(4)
    z = 3 * torch.randn(9, 77, generator=generator)
    label = torch.randint(-1, 77, (9,), generator=generator)
    weight = torch.rand(9, generator=generator)
    wide, narrow = z.clone(), z.clone()
    rows = [
        cross_entropy_(out, label, weight, 0.1, t) for out, t in ((wide, z.dtype), (narrow, dtype))
    ]
    assert torch.equal(*rows)
    assert torch.equal(rows_in(narrow, dtype), wide.to(dtype))
    lse = rows[0][0]
    wide, narrow = z.clone(), z.clone()
    for out, t in ((wide, z.dtype), (narrow, dtype)):
        cross_entropy_gradient_(out, label, lse, weight * (1 + 0.2 * lse), weight, t)
    assert torch.equal(rows_in(narrow, dtype), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_reckoned_with_in_fp32(dtype):
    generator = torch.Generator().manual_seed(4)
    narrow = (3 * torch.randn(9, 77, generator=generator)).to(dtype)
    label, weight = (
        torch.randint(-1, 77, (9,), generator=generator),
        torch.rand(9, generator=generator),
    )
    wide = narrow.float()
    torch.testing.assert_close(
        cross_entropy_partials(narrow, label), cross_entropy_partials(wide, label), rtol=0, atol=0
    )
    rows = [cross_entropy_(z, label, weight, 0.0, z.dtype) for z in (narrow, wide)]
    assert torch.equal(*rows)
    assert torch.equal(narrow, wide.to(dtype))


def test_a_token_without_weight_has_no_gradient_whatever_its_logits():
    z = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0], [0.0, 0.0]])
    label = torch.tensor([0, 1, 1])
    cross_entropy_(z, label, torch.tensor([0.0, 0.0, 1.0]), 0.0, z.dtype)
    assert z.tolist() == [[0.0, 0.0], [0.0, 0.0], [0.5, -0.5]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_rows_are_ops_that_torch_can_trace(dtype, device):
    z = torch.randn(5, 33, device=device)
    label = torch.tensor([0, 32, -1, 4, 4], device=device)
    row = torch.rand(5, device=device)
    torch.library.opcheck(torch.ops.mlr1.cross_entropy_partials.default, (z, label))
    both = torch.ops.mlr1.cross_entropy_.default
    torch.library.opcheck(both, (z.clone(), label, row, 0.1, dtype))
    gradient = torch.ops.mlr1.cross_entropy_gradient_.default
    torch.library.opcheck(gradient, (z, label, row, row, row, dtype))
