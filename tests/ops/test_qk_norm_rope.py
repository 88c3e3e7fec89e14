"""The fused QKV taken apart: value and gradient on every row, against the formula in float64."""

from itertools import pairwise

import pytest
import torch

from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_backward_reference,
    qk_norm_rope_reference,
)

EPS = 1e-5
# Shape in front of the columns, query heads, groups, width of a head.
SHAPES = [
    ((6, 2), 4, 2, 64),
    ((1, 1), 1, 1, 2),
    ((5, 3), 9, 3, 6),
    ((7, 1), 2, 2, 20),
    ((3, 2), 5, 1, 96),
    ((2, 1), 3, 1, 250),
    ((0, 2), 2, 1, 8),
]
# Bits of a fraction: fp32 results pass through a sum of a head and a dozen operations; bf16 and
# fp16 values are computed in fp32 and rounded once, but their gradients come from rounded values.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def angles_of(positions, width, base=10_000.0):
    """fp32 angles of the positions 0, 1, ..., as the engine makes them."""
    frequencies = 1 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)


def inputs(shape, dtype, device, seed=0):
    """A fused QKV, angles, and the gradients of Q, K and V."""
    leading, heads, groups, width = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    qkv = 3 * draw(*leading, (heads + 2 * groups) * width)
    angles = angles_of(leading[0] + 3, width).to(device)
    grads = [draw(*leading, n, width) for n in (heads, groups, groups)]
    return qkv, angles, grads


def definition(qkv, angles, shape, grads, positions=None):
    """Q, K, V and the gradient of `qkv` in float64, by autograd through complex numbers."""
    leading, heads, groups, width = shape
    x = qkv.double().clone().requires_grad_()
    per_group = x.view(*leading, groups, heads // groups + 2, width)
    places = torch.arange(leading[0], device=qkv.device) if positions is None else positions
    turns = torch.exp(1j * angles[places].double())
    turns = turns.view(leading[0], *[1] * len(leading), width // 2)

    def normalise_and_turn(part):
        part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS)
        pairs = torch.view_as_complex(part.reshape(*part.shape[:-1], width // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    q = normalise_and_turn(per_group[..., :-2, :].reshape(*leading, heads, width))
    k = normalise_and_turn(per_group[..., -2, :])
    v = per_group[..., -1, :]
    (grad,) = torch.autograd.grad([q, k, v], x, [g.double() for g in grads])
    return [q.detach(), k.detach(), v.detach(), grad]


def run(qkv, angles, shape, grads, **words):
    x = qkv.detach().requires_grad_()
    outs = qk_norm_rope(x, angles, num_groups=shape[2], eps=EPS, **words)
    (grad,) = torch.autograd.grad(outs, x, grads)
    return [*(out.detach() for out in outs), grad]


def assert_close(actual, expected, dtype):
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous()
        # Absolute as well: a rotation's two terms may cancel.
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_its_definition(shape, dtype, device):
    qkv, angles, grads = inputs(shape, dtype, device)
    expected = definition(qkv, angles, shape, grads)
    assert_close(run(qkv, angles, shape, grads), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("between", [(), (1,)], ids=["T", "T1"])
@pytest.mark.parametrize("lengths", [[4, 3, 6], [13], [1, 1, 11], [5, 0, 8]], ids=str)
def test_positions_begin_anew_with_every_document(lengths, between, dtype, device):
    shape = ((sum(lengths), *between), 6, 2, 12)
    qkv, angles, grads = inputs(shape, dtype, device)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    expected = definition(qkv, angles, shape, grads, positions)
    packed = run(qkv, angles[: max(lengths)], shape, grads, bounds=bounds)
    assert_close(packed, expected, dtype)
    for start, end in pairwise(bounds.tolist()):
        part = ((end - start, *between), *shape[1:])
        alone = run(qkv[start:end], angles, part, [g[start:end] for g in grads])
        for whole, piece in zip(packed, alone, strict=True):
            assert whole[start:end].equal(piece)


@pytest.mark.parametrize("device", DEVICES)
def test_reads_any_layout_of_memory(device):
    shape = ((6, 5), 4, 2, 8)
    qkv, angles, grads = inputs(shape, torch.float32, device)
    expected = definition(qkv, angles, shape, grads)
    # A transpose, a slice, memory off any alignment, and angles as the engine has them: each twice.
    twice = angles.repeat_interleave(2, dim=1)[:, ::2]
    far = [g.mT.contiguous().mT for g in grads]
    for x in (
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
        torch.nn.functional.pad(qkv, (1, 2))[..., 1:-2],
        torch.nn.functional.pad(qkv.flatten(), (1, 0))[1:].view_as(qkv),
    ):
        assert not x.is_contiguous() or x.data_ptr() % 16
        assert_close(run(x, twice, shape, far), expected, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_of_zeros_has_a_value_and_a_gradient(device):
    shape = ((2, 1), 1, 1, 4)
    _, angles, grads = inputs(shape, torch.float32, device)
    zeros = torch.zeros(2, 1, 12, device=device)
    q, k, _, grad = run(zeros, angles, shape, grads)
    assert not q.any()
    assert not k.any()
    expected = definition(zeros, angles, shape, grads)[3]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_stays_in_its_head(device):
    qkv = torch.ones(1, 1, 4 * 4, device=device)
    qkv[0, 0, 5] = float("nan")
    q, k, v = qk_norm_rope(qkv, angles_of(1, 4).to(device), num_groups=1, eps=EPS)
    assert q[0, 0].isnan().all(-1).tolist() == [False, True]
    assert not k.isnan().any()
    assert not v.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_no_loss_follows_from_gets_no_gradient(device):
    qkv, angles, _ = inputs(((3, 2), 4, 2, 8), torch.float32, device)
    q, _, _ = qk_norm_rope(qkv.requires_grad_(), angles, num_groups=2, eps=EPS)
    (grad,) = torch.autograd.grad(q.sum(), qkv)
    heads = grad.view(3, 2, 2, 4, 8)
    assert heads[..., :2, :].any()
    assert not heads[..., 2:, :].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_is_an_op_that_torch_can_trace_and_differentiate(packed, device):
    shape = ((5, 1), 4, 2, 6)
    qkv, angles, grads = inputs(shape, torch.float32, device)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device) if packed else None
    op = torch.ops.mlr1.qk_norm_rope.default
    torch.library.opcheck(op, (qkv.requires_grad_(), angles, bounds, 2, EPS))
    q, k, _, scales = op(qkv.detach(), angles, bounds, 2, EPS)
    torch.library.opcheck(
        torch.ops.mlr1.qk_norm_rope_backward.default, (*grads, q, k, scales, angles, bounds)
    )


@pytest.mark.parametrize(
    ("columns", "positions", "reason"),
    [(20, 3, "not 2 groups"), (32, 2, "3 positions"), (1056, 3, "wider")],
)
def test_refuses_what_is_no_fused_qkv(columns, positions, reason):
    width = 264 if columns == 1056 else 4
    with pytest.raises(AssertionError, match=reason):
        qk_norm_rope(torch.zeros(3, 1, columns), angles_of(positions, width), num_groups=2, eps=EPS)


@pytest.mark.ext
@pytest.mark.parametrize(
    ("bounds", "reason"), [([0, 2], "from 0 to 4"), ([0, 4], "4 tokens has 3 rows of angles")]
)
def test_the_compiled_row_refuses_bounds_that_do_not_fit(bounds, reason):
    with pytest.raises(RuntimeError, match=reason):
        qk_norm_rope(
            torch.zeros(4, 1, 12),
            angles_of(3, 4),
            num_groups=1,
            eps=EPS,
            bounds=torch.tensor(bounds, dtype=torch.int32),
        )


@pytest.mark.ext
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_row_agrees_with_the_python_definition(shape, dtype):
    assert has_row("mlr1::qk_norm_rope", "CPU")
    assert has_row("mlr1::qk_norm_rope_backward", "CPU")
    check_row(shape, dtype, "cpu")


@pytest.mark.ext
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, ((2048, 8), 24, 6, 64)], ids=str)
def test_the_compiled_cuda_row_agrees_with_the_python_definition(shape, dtype):
    assert has_row("mlr1::qk_norm_rope", "CUDA")
    assert has_row("mlr1::qk_norm_rope_backward", "CUDA")
    check_row(shape, dtype, "cuda")


def check_row(shape, dtype, device):
    """Forward and backward beside their definitions: one rounding apart."""
    qkv, angles, grads = inputs(shape, dtype, device)
    ours = torch.ops.mlr1.qk_norm_rope(qkv, angles, None, shape[2], EPS)
    theirs = qk_norm_rope_reference(qkv, angles, None, shape[2], EPS)
    saved = (theirs[0], theirs[1], theirs[3], angles, None)
    backward = torch.ops.mlr1.qk_norm_rope_backward(*grads, *saved)
    expected = qk_norm_rope_backward_reference(*grads, *saved)
    tolerance = TOLERANCE[dtype]
    for got, want in zip((*ours, backward), (*theirs, expected), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_hundred_runs_give_equal_bits(dtype):
    shape = ((1024, 3), 9, 3, 64)
    qkv, angles, grads = inputs(shape, dtype, "cuda")
    first = run(qkv, angles, shape, grads)
    for _ in range(100):
        again = run(qkv, angles, shape, grads)
        assert all(x.equal(y) for x, y in zip(first, again, strict=True))
