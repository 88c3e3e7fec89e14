"""A rotated head gives the same logits, and int8 states lose little behind a rotation."""

import pytest
import torch

from megatron_mlr1.ops.hadamard import LEVELS, quantise, rotate, signs

WIDTHS = [1, 2, 64, 96, 576]


def states(tokens=64, width=1024, seed=0):
    """Hidden states as language models have them: a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    hidden[:, ::256] *= 20
    weight = torch.randn(2000, width, generator=generator) / width**0.5
    return hidden, weight


@pytest.mark.parametrize("width", WIDTHS)
def test_a_folded_head_gives_the_logits_of_the_states_before(width):
    hidden, weight = torch.randn(5, width).double(), torch.randn(7, width).double()
    folded = rotate(hidden, 4) @ rotate(weight, 4).T
    torch.testing.assert_close(folded, hidden @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_keeps_lengths_and_turns_every_channel(width):
    matrix = rotate(torch.eye(width, dtype=torch.float64), 1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    block = width & -width
    assert matrix.count_nonzero() == width * block
    torch.testing.assert_close(matrix.abs().amax(), torch.tensor(block**-0.5).double())


def test_the_seed_alone_decides_the_rotation():
    assert torch.equal(signs(4096, 7), signs(4096, 7))
    assert signs(4096, 7)[:8].tolist() == signs(8, 7).tolist()
    assert not torch.equal(signs(4096, 7), signs(4096, 8))
    assert signs(4096, 7).abs().eq(1).all()
    assert signs(4096, 7).sum().abs() < 5 * 64


def test_states_are_only_read_and_keep_their_type():
    hidden = states()[0].bfloat16()
    before = hidden.clone()
    assert rotate(hidden, 0).dtype == torch.bfloat16
    quantise(hidden)
    assert torch.equal(hidden, before)


def test_int8_is_within_half_a_level():
    hidden = states()[0]
    hidden[3] = 0
    levels, scale = quantise(hidden)
    assert levels.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert levels.abs().amax() == LEVELS
    assert scale[3] == 0
    error = (levels * scale[:, None] - hidden).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()


def divergence(exact, other):
    log_p, log_q = exact.log_softmax(1), other.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def test_behind_a_rotation_int8_changes_the_teacher_by_less_than_a_thousandth_of_a_nat():
    hidden, weight = (x.double() for x in states())
    exact = hidden @ weight.T
    levels, scale = quantise(rotate(hidden, 2))
    rotated = (levels.double() @ rotate(weight, 2).T) * scale[:, None]
    plain_levels, plain_scale = quantise(hidden)
    plain = (plain_levels.double() @ weight.T) * plain_scale[:, None]
    assert divergence(exact, rotated) < 1e-3
    assert divergence(exact, rotated) < divergence(exact, plain) / 10
    assert (exact.argmax(1) == rotated.argmax(1)).double().mean() > 0.95
