"""SwiGLU's value and gradient on every row, against the formula in float64."""

import pytest
import torch

from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.swiglu import (
    swiglu,
    swiglu_backward_reference,
    swiglu_reference,
)

SHAPES = [(4, 16, 128), (1, 2), (41, 3, 1270), (7, 0, 6)]
# Bits of a fraction: fp32 results pass through ten operations, each with half a unit of 2^-24 and
# an exponential with a few; bf16 and fp16 results are computed in fp32 and rounded once.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(shape, dtype, device, seed=0):
    """[gate | up] and the gradient of the output, the gates reaching where sigmoid saturates."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = 6 * torch.randn(shape, generator=generator)
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator)
    return gate_up.to(device, dtype), grad.to(device, dtype)


def definition(gate_up, grad_out):
    """Value and gradient in float64, by autograd through the formula alone."""
    x = gate_up.double().clone().requires_grad_()
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    out = gate / (1 + (-gate).exp()) * up
    (grad_in,) = torch.autograd.grad(out, x, grad_out.double())
    return out.detach(), grad_in


def assert_close(actual, expected, dtype):
    # Absolute as well: silu's gradient passes through zero, where terms of order 10 cancel.
    rounding = 2**-52 if dtype == torch.float64 else 2**-23
    atol = 16 * rounding
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["reference", "mlr1"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_its_definition(shape, dtype, kernel, device):
    gate_up, grad_out = inputs(shape, dtype, device)
    out, grad_in = definition(gate_up, grad_out)
    x = gate_up.clone().requires_grad_()
    y = swiglu(x, kernel=kernel)
    y.backward(grad_out)
    assert y.dtype == x.grad.dtype == dtype
    assert_close(y.detach(), out, dtype)
    assert_close(x.grad, grad_in, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["reference", "mlr1"])
def test_reads_any_layout_of_memory(kernel, device):
    gate_up, grad_out = inputs((6, 5, 26), torch.float32, device)
    out, grad_in = definition(gate_up, grad_out)
    # A transpose, and a slice that begins one element off any alignment.
    for x in (gate_up.mT.contiguous().mT, torch.nn.functional.pad(gate_up, (1, 2))[..., 1:-2]):
        x = x.detach().requires_grad_()
        assert not x.is_contiguous()
        y = swiglu(x, kernel=kernel)
        (grad,) = torch.autograd.grad(y, x, grad_out.mT.contiguous().mT)
        assert_close(y.detach(), out, torch.float32)
        assert_close(grad, grad_in, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_saturated_gates_give_finite_values_and_gradients(device):
    gates = torch.tensor([-1e4, -200.0, -64.5, -0.0, 64.5, 200.0, 1e4], device=device)
    gate_up = torch.cat((gates, torch.ones_like(gates))).requires_grad_()
    y = swiglu(gate_up, kernel="mlr1")
    y.sum().backward()
    torch.testing.assert_close(y.detach(), gates.relu(), rtol=1e-6, atol=1e-22)
    expected = (gates > 0).float() + 0.5 * (gates == 0).float()
    torch.testing.assert_close(gate_up.grad[:7], expected, rtol=1e-6, atol=1e-22)


def test_not_a_number_stays_visible():
    gate_up = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])
    assert swiglu(gate_up, kernel="mlr1").isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_that_torch_can_trace_and_differentiate(device):
    gate_up, grad_out = inputs((3, 14), torch.float32, device)
    op = torch.ops.mlr1.swiglu.default
    torch.library.opcheck(op, (gate_up.requires_grad_(),))
    torch.library.opcheck(torch.ops.mlr1.swiglu_backward.default, (grad_out, gate_up.detach()))


def test_refuses_a_width_that_is_not_gate_and_up():
    with pytest.raises(AssertionError, match="odd width"):
        swiglu(torch.zeros(2, 3), kernel="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ligers_function_matches_the_definition(dtype):
    pytest.importorskip("liger_kernel", reason="needs Liger-Kernel (pip install liger-kernel)")
    gate_up, grad_out = inputs((41, 3, 1270), dtype, "cuda")
    out, grad_in = definition(gate_up, grad_out)
    x = gate_up.clone().requires_grad_()
    y = swiglu(x, kernel="liger")
    y.backward(grad_out)
    # It multiplies in the tensors' type, so that bf16 is rounded several times.
    close = {"rtol": 4 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(y.detach().double(), out, **close)
    torch.testing.assert_close(x.grad.double(), grad_in, **close)


@pytest.mark.ext
def test_a_compiled_row_takes_the_place_of_the_definition():
    assert has_row("mlr1::swiglu", "CPU")
    assert has_row("mlr1::swiglu_backward", "CPU")
    with torch.profiler.profile(acc_events=True) as profile:
        x = torch.ones(2, 4, requires_grad=True)
        swiglu(x, kernel="mlr1").sum().backward()
    names = {event.name for event in profile.events()}
    assert "mlr1::swiglu_backward" in names
    assert not names & {"aten::silu", "aten::sigmoid"}


@pytest.mark.ext
@pytest.mark.gpu
def test_the_compiled_cuda_row_agrees_with_the_python_definition_on_long_tensors():
    gate_up, grad_out = inputs((70_000, 48), torch.bfloat16, "cuda")
    assert has_row("mlr1::swiglu", "CUDA")
    # Both compute in fp32 and round once: they differ where a value lies between two bf16 numbers.
    close = {"rtol": 2**-7, "atol": 1e-6}
    y = torch.ops.mlr1.swiglu(gate_up)
    torch.testing.assert_close(y, swiglu_reference(gate_up), **close)
    dx = torch.ops.mlr1.swiglu_backward(grad_out, gate_up)
    torch.testing.assert_close(dx, swiglu_backward_reference(grad_out, gate_up), **close)
