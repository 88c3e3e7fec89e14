"""Distillation from sparse targets against whole logits, log-softmax and autograd."""

from dataclasses import replace

import pytest
import torch

from megatron_mlr1.ops.head_chunks import BOTH_GRADIENTS, Chunks, Shard, Wanted, rows_in
from megatron_mlr1.ops.linear_kl import Head, TokenWeights
from megatron_mlr1.ops.linear_sparse_kl import linear_sparse_kl
from megatron_mlr1.ops.sparse_kl_rows import sparse_kl_gradient_, sparse_kl_partials
from megatron_mlr1.ops.sparse_targets import SparseForm, offsets, sparse_targets
from tests.support.softmax_losses import case, logits, value_and_gradients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEY = bytes(16)


def targets_of(inputs, form):
    t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
    return sparse_targets(t, offsets(KEY, 0, 0, len(t)), form)


def run(inputs, targets, size=7, z_loss=0.0, *, wanted=BOTH_GRADIENTS, **chunks):
    return linear_sparse_kl(
        Head(hidden=inputs.hidden, weight=inputs.weight),
        targets,
        inputs.labels,
        TokenWeights(cross_entropy=inputs.ce_weight, divergence=inputs.kd_weight),
        z_loss=z_loss,
        shard=Shard(first_id=0, num_ids=inputs.num_ids),
        chunks=Chunks(size=size, **chunks),
        wanted=wanted,
    )


def outputs(result):
    return result.total, result.gradients.hidden, result.gradients.weight


def definition(inputs, targets, hidden, weight, z_loss):
    """Loss by the events that the target names: ids, and for a bucket all others as one."""
    z = logits(hidden, weight, inputs.num_ids)
    log_q = (z / targets.form.temperature).log_softmax(1)
    cross = -(targets.weights * log_q.gather(1, targets.ids)).sum(1)
    if targets.form.tail_is_bucket:
        others = torch.ones_like(log_q, dtype=torch.bool).scatter_(1, targets.ids, False)
        cross = cross - targets.tail * log_q.masked_fill(~others, float("-inf")).logsumexp(1)
    divergence = cross - targets.entropy
    ce = torch.nn.functional.cross_entropy(z, inputs.labels, reduction="none")
    ce = ce + z_loss * z.logsumexp(1) ** 2
    scale = targets.form.temperature**2
    return (inputs.ce_weight * ce + inputs.kd_weight * scale * divergence).sum()


@pytest.mark.parametrize("size", [1, 7, None])
@pytest.mark.parametrize(
    "form",
    [
        SparseForm(top=6, points=0, temperature=2.0),
        SparseForm(top=4, points=9, temperature=0.5),
        SparseForm(top=0, points=30),
    ],
    ids=["bucket", "hybrid", "systematic"],
)
def test_value_and_gradients_are_the_definitions(form, size):
    inputs = case()
    targets = targets_of(inputs, form)
    hidden, weight = inputs.hidden.clone(), inputs.weight.clone()
    total = definition(inputs, targets, hidden.requires_grad_(), weight.requires_grad_(), 0.01)
    expected = (total.detach(), *torch.autograd.grad(total, (hidden, weight)))
    for got, want in zip(outputs(run(inputs, targets, size, z_loss=0.01)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gradients_times_a_factor_join_what_is_there_and_bf16_logits_cost_their_rounding():
    inputs = case()
    targets = targets_of(inputs, SparseForm(top=4, points=5))
    into = torch.ones_like(inputs.weight)
    wanted = Wanted(factor=torch.tensor(3.0, dtype=torch.float64), into=into)
    result, plain = run(inputs, targets, wanted=wanted), run(inputs, targets)
    assert result.gradients.weight is into
    expected = plain.total, 3 * plain.gradients.hidden, 1 + 3 * plain.gradients.weight
    for got, want in zip(outputs(result), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    names = [name for name, value in vars(inputs).items() if torch.is_tensor(value)]
    single = {name: getattr(inputs, name).float() for name in names if name != "labels"}
    inputs = replace(inputs, **single)
    targets = targets_of(inputs, SparseForm(top=4, points=5))
    rounded, plain = (run(inputs, targets, logits=to) for to in (torch.bfloat16, None))
    for got, want in zip(outputs(rounded), outputs(plain), strict=True):
        assert not torch.equal(got, want)
        assert (got - want).norm() < 0.02 * want.norm()


def test_all_ids_kept_are_the_exact_loss():
    inputs = case()
    exact = value_and_gradients(inputs, temperature=2.0)
    for points in (0, 3):
        form = SparseForm(top=inputs.num_ids, points=points, temperature=2.0)
        for got, want in zip(outputs(run(inputs, targets_of(inputs, form))), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [SparseForm(top=4, points=5), SparseForm(top=0, points=9)])
def test_the_mean_gradient_of_many_draws_is_the_exact_one(form):
    one, draws = case(tokens=1), 20_000
    names = ("hidden", "teacher_hidden", "labels")
    many = replace(
        one,
        **{name: getattr(one, name).repeat_interleave(draws, 0) for name in names},
        ce_weight=torch.zeros(draws, dtype=torch.float64),
        kd_weight=torch.ones(draws, dtype=torch.float64),
    )
    result = run(many, targets_of(many, form), size=None)
    one = replace(one, ce_weight=many.ce_weight[:1], kd_weight=many.kd_weight[:1])
    value, to_hidden, _ = value_and_gradients(one, temperature=1.0)
    drawn = torch.cat([result.gradients.hidden, result.divergence[:, None]], 1)
    exact = torch.cat([to_hidden[0], value[None]])
    error = drawn.std(0) / draws**0.5
    assert (error > 0).all()
    assert ((drawn.mean(0) - exact).abs() <= 5 * error).all()


def test_a_tail_that_the_teacher_left_keeps_its_digits():
    # All but 1e-12 of the student lies on the two ids; 1 - sum would have no digits of it.
    z = torch.tensor([[30.0, 29.0, 1.0, 0.5, 0.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, 1.5, 0.3, 0.2, 0.1]], dtype=torch.float64)
    inputs = replace(
        case(tokens=1),
        hidden=z.float(),
        weight=torch.eye(5),
        labels=torch.tensor([0]),
        ce_weight=torch.zeros(1),
        kd_weight=torch.ones(1),
        num_ids=5,
    )
    exact = sparse_targets(t, torch.zeros(1), SparseForm(top=2, points=0))
    narrow = replace(
        exact,
        weights=exact.weights.float(),
        tail=exact.tail.float(),
        entropy=exact.entropy.float(),
    )
    result = run(inputs, narrow)
    wide = z.clone().requires_grad_()
    double = replace(inputs, hidden=z, weight=torch.eye(5).double())
    total = definition(double, exact, wide, double.weight, 0.0)
    (grad,) = torch.autograd.grad(total, wide)
    torch.testing.assert_close(result.total.double(), total.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.gradients.hidden.double(), grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_its_rows_are_ops_that_torch_can_trace(device):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 33, generator=generator).to(device)
    label = torch.tensor([0, 32, -1, 4, 4], device=device)
    column = torch.randint(-1, 33, (5, 6), generator=generator).to(device)
    weight = torch.rand(5, 6, generator=generator).to(device)
    rows, weights = torch.rand(2, 3, 5, generator=generator).to(device)
    for bucket in (False, True):
        args = (z, label, column, weight, 2.0, bucket)
        torch.library.opcheck(torch.ops.mlr1.sparse_kl_partials.default, args)
        args = (z, label, column, weight, rows, weights, 2.0, bucket, z.dtype)
        torch.library.opcheck(torch.ops.mlr1.sparse_kl_gradient_.default, args)


@pytest.mark.parametrize("bucket", [False, True])
def test_a_narrow_gradient_is_the_wide_one_rounded_once_and_narrow_logits_count_as_fp32(bucket):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 33, generator=generator).bfloat16()
    label = torch.tensor([0, 32, -1, 4, 4])
    column = torch.stack([torch.randperm(33, generator=generator)[:6] for _ in range(5)])
    given = torch.rand(5, 6, generator=generator)
    rows, weights = torch.rand(2, 3, 5, generator=generator)
    wide, inside = z.float(), z.float()
    partials = [sparse_kl_partials(x, label, column, given, 2.0, bucket) for x in (z, wide)]
    assert torch.equal(*partials)
    for out, dtype in ((wide, torch.float32), (inside, z.dtype), (z, z.dtype)):
        sparse_kl_gradient_(out, label, column, given, rows, weights, 2.0, bucket, dtype)
    assert torch.equal(rows_in(inside, z.dtype), wide.bfloat16())
    assert torch.equal(z, wide.bfloat16())
