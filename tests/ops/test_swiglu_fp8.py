"""SwiGLU's FP8 output on every row: the rounding number by number, and the whole op."""

import pytest
import torch

from megatron_mlr1.ops.extension import has_row
from megatron_mlr1.ops.swiglu import swiglu
from megatron_mlr1.ops.swiglu_fp8 import LARGEST, NOT_A_NUMBER, swiglu_fp8, swiglu_fp8_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(6, 5, 64), (1, 2), (131, 3, 74), (0, 4), (160, 288)]
ROWS = {
    "definition": lambda x, scale, amax: swiglu_fp8_reference(x, scale, amax, False)[0],
    "op": lambda x, scale, amax: swiglu_fp8(x, scale, amax, transpose=False)[0],
}


def one(value, device="cpu"):
    return torch.tensor([value], device=device)


def inputs(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator)).to(device, dtype)


def quantised(numbers, row, scale=1.0):
    """E4M3 of numbers as a row rounds them: gates so wide open that silu(gate) * up is their value.

    A gate of 128 is 2^7 to the last bit of fp32, and the scale takes it out again.
    """
    gates = torch.full_like(numbers, 128.0)
    gate_up = torch.cat((gates, numbers)).to(numbers.device)
    amax = one(0.0, numbers.device)
    out = ROWS[row](gate_up, one(scale / 128, numbers.device), amax)
    return out, amax


def e4m3_by_torch(numbers):
    return numbers.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def assert_same_numbers(bits, expected):
    nan = (expected & 0x7F) == NOT_A_NUMBER
    assert (bits[nan] == NOT_A_NUMBER).all()
    assert torch.equal(bits[~nan], expected[~nan])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS)
def test_every_bf16_number_is_rounded_as_torch_rounds_it(row, device):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # What 128 times leaves a bf16 number; the others are reached by a smaller scale below.
    held = every[(every.float().abs() < 2.0**120) | every.isnan()].to(device)
    bits, _ = quantised(held, row)
    assert_same_numbers(bits, e4m3_by_torch(held))
    beyond = every[(every.float().abs() >= 2.0**120)].to(device)
    bits, _ = quantised(beyond, row)
    assert set(bits[beyond > 0].tolist()) == {0x7E}
    assert set(bits[beyond < 0].tolist()) == {0xFE}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("spread", [2.0**-9, 1.0, 300.0])
def test_random_fp32_numbers_are_rounded_as_torch_rounds_them(spread, row, device):
    generator = torch.Generator().manual_seed(0)
    numbers = (spread * torch.randn(100_000, generator=generator)).to(device)
    bits, amax = quantised(numbers, row)
    assert_same_numbers(bits, e4m3_by_torch(numbers))
    assert amax.item() == 128 * numbers.abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
def test_not_one_byte_in_millions_is_another(device):
    for _ in range(20):
        gate_up = (0.3 * torch.randn(200, 768)).to(device, torch.bfloat16)
        scale, amax = 100 + 900 * torch.rand(1).to(device), one(0.0, device)
        plain = swiglu(gate_up, kernel="mlr1").float()
        out, _, _ = swiglu_fp8(gate_up, scale, amax, transpose=False)
        assert torch.equal(out, e4m3_by_torch(plain * scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS)
def test_ties_go_to_even_and_subnormal_numbers_are_exact(row, device):
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (grid[1:] + grid[:-1]) / 2
    numbers = torch.cat((grid, -grid, halves, -halves)).to(device)
    bits, _ = quantised(numbers, row)
    codes = torch.arange(0x7F, dtype=torch.uint8)
    even = codes[:-1] + codes[:-1] % 2
    expected = torch.cat((codes, codes | 0x80, even, even | 0x80)).to(device)
    assert torch.equal(bits, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_of_swiglu_and_then_a_cast(shape, dtype, device):
    gate_up, scale, amax = inputs(shape, dtype, device), one(20.0, device), one(0.25, device)
    plain = swiglu(gate_up, kernel="mlr1").float()
    out, out_t, inverse = swiglu_fp8(gate_up, scale, amax, transpose=True)
    assert torch.equal(out, e4m3_by_torch(plain * 20.0))
    assert torch.equal(out_t, out.flatten(0, -2).t())
    assert out_t.is_contiguous()
    assert torch.equal(inverse, 1 / scale)
    largest = plain.abs().max().item() if plain.numel() else 0.0
    assert amax.item() == max(0.25, largest)


@pytest.mark.parametrize("device", DEVICES)
def test_no_copy_is_made_that_is_not_asked_for(device):
    _, out_t, _ = swiglu_fp8(
        inputs((4, 8), torch.bfloat16, device), one(1.0, device), one(0.0, device), transpose=False
    )
    assert out_t.shape == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS)
def test_not_a_number_stays_visible_and_does_not_move_the_amax(row, device):
    gate_up = torch.tensor([[torch.nan, 2.0, 2.0, 1.0], [2.0, 1.0, torch.nan, 1.0]], device=device)
    amax = one(0.0, device)
    bits = ROWS[row](gate_up, one(1.0, device), amax)
    assert (bits == NOT_A_NUMBER).tolist() == [[True, False], [True, False]]
    assert amax.item() == pytest.approx(2 / (1 + 2.718281828**-2.0))


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout_of_memory_is_read(device):
    gate_up = inputs((6, 5, 26), torch.float32, device)
    expected = swiglu_fp8(gate_up, one(9.0, device), one(0.0, device), transpose=True)
    for x in (gate_up.mT.contiguous().mT, torch.nn.functional.pad(gate_up, (1, 2))[..., 1:-2]):
        assert not x.is_contiguous()
        results = swiglu_fp8(x, one(9.0, device), one(0.0, device), transpose=True)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transpose", [True, False])
def test_is_an_op_that_torch_can_trace(transpose, device):
    gate_up = inputs((3, 14), torch.bfloat16, device)
    arguments = (gate_up, one(2.0, device), one(0.0, device), transpose)
    torch.library.opcheck(torch.ops.mlr1.swiglu_fp8.default, arguments)


@pytest.mark.parametrize(
    ("gate_up", "scale", "message"),
    [
        (torch.zeros(2, 3), one(1.0), "odd width"),
        (torch.zeros(2, 4).double(), one(1.0), "no E4M3"),
        (torch.zeros(2, 4), torch.ones(2), "one element"),
        (torch.zeros(2, 4), one(1), "are fp32"),
    ],
)
def test_wrong_inputs_are_refused(gate_up, scale, message):
    with pytest.raises(AssertionError, match=message):
        swiglu_fp8(gate_up, scale, one(0.0), transpose=False)


@pytest.mark.ext
def test_a_compiled_row_takes_the_place_of_the_definition():
    assert has_row("mlr1::swiglu_fp8", "CPU")
    with torch.profiler.profile(acc_events=True) as profile:
        swiglu_fp8(torch.ones(2, 4), one(1.0), one(0.0), transpose=True)
    names = {event.name for event in profile.events()}
    assert "mlr1::swiglu_fp8" in names
    assert not names & {"aten::silu", "aten::clamp"}


@pytest.mark.ext
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 2 * 6144), (1003, 2 * 777)])
def test_a_hundred_runs_of_the_cuda_row_give_equal_bits(shape):
    assert has_row("mlr1::swiglu_fp8", "CUDA")
    gate_up = inputs(shape, torch.bfloat16, "cuda")
    runs = []
    for _ in range(100):
        amax = one(0.0, "cuda")
        runs.append((*swiglu_fp8(gate_up, one(7.0, "cuda"), amax, transpose=True), amax))
        assert all(torch.equal(a, b) for a, b in zip(runs[-1], runs[0], strict=True))
        del runs[1:]
