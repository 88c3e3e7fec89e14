"""Products of narrow matrices keep the digits of their sums."""

import pytest
import torch

from megatron_mlr1.ops import wide_matmul
from megatron_mlr1.ops.head_chunks import rows_in
from megatron_mlr1.ops.wide_matmul import (
    add_to_weight,
    back_to_hidden,
    gradient_dtype,
    logits_into,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The factors are exact in fp32, so the errors are those of fp32 sums over 96 to 300 products. On
# CUDA the logits' gradient is rounded to bf16 first.
SUMS, ROUNDED = 1e-5, 2**-8


def factors(dtype, device):
    generator = torch.Generator().manual_seed(1)
    shapes = {"grad": (37, 300), "hidden": (37, 96), "weight": (300, 96)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made["grad"].to(device), *(made[n].to(device, dtype) for n in ("hidden", "weight"))


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_not_rounded_to_the_type_of_the_factors(dtype, device, monkeypatch):
    monkeypatch.setattr(wide_matmul, "BLOCK_ROWS", 128)
    grad, hidden, weight = factors(dtype, device)
    out = torch.full((37, 300), 7.0, device=device)
    logits_into(out, hidden, weight)
    assert relative(out, hidden.double() @ weight.double().T) < SUMS
    inward = gradient_dtype(torch.float32, hidden)
    limit = SUMS if inward == torch.float32 else ROUNDED
    assert limit == SUMS or device == "cuda"
    # As the head has it: a narrow gradient in the first half of each row of its logits.
    exact, logits = grad, grad.clone()
    grad = rows_in(logits, inward)
    grad.copy_(exact)
    back = back_to_hidden(grad, weight, torch.float32)
    assert back.dtype == torch.float32
    assert relative(back, exact.double() @ weight.double()) < limit
    narrow = back_to_hidden(grad, weight, dtype)
    assert narrow.dtype == dtype
    assert relative(narrow, exact.double() @ weight.double()) < ROUNDED
    total = torch.ones(300, 96, device=device)
    add_to_weight(total, grad, hidden)
    assert relative(total, 1 + exact.double().T @ hidden.double()) < limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_logits_and_a_narrow_gradient_of_them_are_rounded_once(dtype, device):
    grad, hidden, weight = factors(dtype, device)
    out = torch.empty(37, 300, dtype=torch.bfloat16, device=device)
    logits_into(out, hidden, weight)
    exact = hidden.double() @ weight.double().T
    assert relative(out, exact) < ROUNDED
    assert (out.double() - exact.bfloat16().double()).abs().gt(0).double().mean() < 0.01
    wide = grad.clone()
    inside = rows_in(wide, torch.bfloat16)
    inside.copy_(grad)
    rounded = inside.double()
    back = back_to_hidden(inside, weight, torch.float32)
    assert relative(back, rounded @ weight.double()) < SUMS
    total = torch.zeros(300, 96, device=device)
    add_to_weight(total, inside, hidden)
    assert relative(total, rounded.T @ hidden.double()) < SUMS


def test_fp64_stays_fp64():
    grad, hidden, weight = (x.double() for x in factors(torch.float32, "cpu"))
    out = torch.empty(37, 300, dtype=torch.float64)
    logits_into(out, hidden, weight)
    assert relative(out, hidden @ weight.T) < 1e-15
    assert relative(back_to_hidden(grad, weight, torch.float64), grad @ weight) < 1e-14


def test_what_is_added_to_may_be_a_slice():
    grad, hidden, _ = factors(torch.bfloat16, "cpu")
    whole = torch.zeros(310, 96)
    add_to_weight(whole[:300], grad, hidden)
    assert relative(whole[:300], grad.double().T @ hidden.double()) < SUMS
    assert not whole[300:].any()
