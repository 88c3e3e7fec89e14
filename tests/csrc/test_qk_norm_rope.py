"""csrc/qk_norm_rope.cu, run whole on a CPU, against the definition."""

import pytest
import torch

from megatron_mlr1.ops.qk_norm_rope import (
    qk_norm_rope_backward_reference,
    qk_norm_rope_reference,
)
from tests.csrc.devices import H200, displaced, strided

EPS = 1e-5
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
# Positions, sequences, query heads, groups, width of a head. The first are the models'; 96 leaves
# lanes idle, 256 fills them several times, 6 and 250 hold no vector of 16 bytes in bf16. Eleven
# tokens are two blocks.
SHAPES = [
    (11, 1, 9, 3, 64),
    (3, 2, 16, 4, 64),
    (2, 1, 24, 6, 64),
    (3, 3, 4, 2, 16),
    (2, 1, 3, 1, 96),
    (2, 2, 2, 2, 256),
    (11, 1, 4, 2, 6),
    (2, 1, 2, 1, 250),
    (1, 1, 1, 1, 2),
]


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("qk_norm_rope")


def as_it_is(tensor):
    return tensor


def run(host, shape, dtype, *, bounds=None, order=0, moved=as_it_is, turned=as_it_is):
    """What both ops give, and what they must: Q, K, V, scales, gradient of the fused QKV.

    `moved` makes the tensors that lie as they lie, `turned` the angles.
    """
    length, batch, heads, groups, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return moved(torch.randn(length, batch, *size, generator=generator).to(dtype))

    positions = length if bounds is None else int(bounds.diff().max())
    frequencies = 1 / 100 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = turned(torch.outer(torch.arange(positions).float(), frequencies))
    qkv = draw((heads + 2 * groups) * width)
    grads = [draw(n, width) for n in (heads, groups, groups)]
    expected = qk_norm_rope_reference(qkv, angles, bounds, groups, EPS)
    saved = [moved(expected[i]) for i in (0, 1, 3)]
    gradient = qk_norm_rope_backward_reference(*grads, *saved, angles, bounds)
    forward = host.run(H200, "qk_norm_rope", qkv, angles, bounds, groups, EPS, order=order)
    words = (*grads, *saved, angles, bounds)
    backward = host.run(H200, "qk_norm_rope_backward", *words, order=order)
    for launch in (*forward.launches, *backward.launches):
        assert (launch.grid, launch.block) == ((-(-length * batch // 8), 1, 1), (32, 8, 1))
    return [*forward.result, backward.result], [*expected, gradient]


def assert_close(actual, expected, dtype):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert got.is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_the_definitions(host, shape, dtype):
    assert_close(*run(host, shape, dtype), dtype)


@pytest.mark.parametrize("moved", [displaced, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_may_begin_anywhere_and_have_strides(host, dtype, moved):
    assert_close(*run(host, SHAPES[0], dtype, moved=moved, order=2), dtype)


@pytest.mark.parametrize(
    "turned", [strided, torch.Tensor.double, lambda angles: angles.t().contiguous().t()]
)
def test_angles_may_have_strides_and_another_type(host, turned):
    assert_close(*run(host, SHAPES[1], torch.float32, turned=turned), torch.float32)


@pytest.mark.parametrize("bounds", [[0, 4, 5, 13], [0, 13], [0, 6, 6, 13, 13]], ids=str)
def test_positions_begin_anew_with_every_document(host, bounds):
    bounds = strided(torch.tensor(bounds, dtype=torch.int32))
    got = run(host, (13, 1, 4, 2, 16), torch.float32, bounds=bounds)
    assert_close(*got, torch.float32)


def test_documents_may_lie_in_one_dimension(host):
    qkv, bounds = torch.randn(13, 6 * 16), torch.tensor([0, 6, 13], dtype=torch.int32)
    angles = torch.randn(7, 8)
    got = host.run(H200, "qk_norm_rope", qkv, angles, bounds, 2, EPS).result
    assert_close(got, qk_norm_rope_reference(qkv, angles, bounds, 2, EPS), torch.float32)


@pytest.mark.parametrize("shape", [(0, 2, 9, 3, 64), (2, 0, 9, 3, 64)], ids=str)
def test_nothing_is_launched_for_no_tokens(host, shape):
    length, batch, heads, groups, width = shape
    angles = torch.ones(4, width // 2)
    forward = host.run(
        *(H200, "qk_norm_rope", torch.empty(length, batch, (heads + 2 * groups) * width)),
        *(angles, None, groups, EPS),
    )
    *of_heads, scales = forward.result
    assert [tuple(each.shape[2:]) for each in of_heads] == [(9, 64), (3, 64), (3, 64)]
    assert scales.shape == (length, batch, 12)
    backward = host.run(
        H200, "qk_norm_rope_backward", *of_heads, *of_heads[:2], scales, angles, None
    )
    assert backward.result.shape == (length, batch, 15 * 64)
    assert not forward.launches + backward.launches


def test_wider_heads_are_refused(host):
    with pytest.raises(RuntimeError, match="heads of 258 are wider than 256"):
        host.run(H200, "qk_norm_rope", torch.ones(1, 1, 774), torch.ones(1, 129), None, 1, EPS)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5]], ids=str)
def test_no_bit_depends_on_the_order_of_the_threads(host, shape):
    first, *others = (run(host, shape, torch.bfloat16, order=order)[0] for order in (0, 1, 2, 3))
    for other in others:
        assert all(x.equal(y) for x, y in zip(first, other, strict=True))
