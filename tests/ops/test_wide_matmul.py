"""Products of narrow matrices keep the digits of their sums."""

import pytest
import torch

from megatron_mlr1.ops import wide_matmul
from megatron_mlr1.ops.wide_matmul import add_to_weight, back_to_hidden, logits_into

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
    limit = ROUNDED if device == "cuda" and dtype != torch.float32 else SUMS
    back = back_to_hidden(grad, weight)
    assert back.dtype == torch.float32
    assert relative(back, grad.double() @ weight.double()) < limit
    total = torch.ones(300, 96, device=device)
    add_to_weight(total, grad, hidden)
    assert relative(total, 1 + grad.double().T @ hidden.double()) < limit


def test_fp64_stays_fp64():
    grad, hidden, weight = (x.double() for x in factors(torch.float32, "cpu"))
    out = torch.empty(37, 300, dtype=torch.float64)
    logits_into(out, hidden, weight)
    assert relative(out, hidden @ weight.T) < 1e-15
    assert relative(back_to_hidden(grad, weight), grad @ weight) < 1e-14


def test_what_is_added_to_may_be_a_slice():
    grad, hidden, _ = factors(torch.bfloat16, "cpu")
    whole = torch.zeros(310, 96)
    add_to_weight(whole[:300], grad, hidden)
    assert relative(whole[:300], grad.double().T @ hidden.double()) < SUMS
    assert not whole[300:].any()
