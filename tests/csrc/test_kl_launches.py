"""csrc/kl_rows.cu, run whole on a CPU: the ops of a shard of the vocabulary."""

from itertools import product

import pytest
import torch

from megatron_mlr1.ops.kl_rows import (
    jsd_partials_reference,
    kl_gradient_reference,
    kl_partials_reference,
)
from tests.csrc.devices import H200, displaced, strided
from tests.support.logit_rows import PAIRS, assert_gradient, assert_sums, log_sums, of_rows, pair

VOCABULARY = 128_256
DIRECTIONS = ("forward", "reverse", "jsd")
BETA = 0.2


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("kl_rows")


def partials(host, given, temperature, reverse, order=0):
    """Run `kl_partials` and, of a temperature, `jsd_partials`; compare both."""
    z, t, label = given
    words = temperature, reverse
    run = host.run(H200, "kl_partials", z, t, label, *words, order=order)
    expected = kl_partials_reference(z.double(), t.double(), label, *words)
    assert_sums(run.result, expected, z.dtype)
    _, lse, teacher_lse = log_sums(z, t, label, temperature)
    words = temperature, BETA
    jsd = host.run(H200, "jsd_partials", z, t, lse - teacher_lse, lse, *words, order=order)
    inputs = (each.double() for each in (z, t, lse - teacher_lse, lse))
    assert_sums(jsd.result, jsd_partials_reference(*inputs, *words), z.dtype)
    return run.launches + jsd.launches


def gradient(host, given, narrow, temperature, direction, order=0):
    """Run `kl_gradient_`, compare the gradient and the split."""
    z, t, label = given
    rows, dtype = z.size(0), z.dtype
    numbers = torch.cat((log_sums(z, t, label, temperature), of_rows(1, rows, dtype)))
    weights = of_rows(3, rows, dtype, seed=2)
    weights[:, 1:][:, :1] = 0  # a masked row
    words = label, numbers, weights, temperature, direction, BETA
    run = host.run(H200, "kl_gradient_", z, t, *words, narrow, order=order)
    wide, others = z.double(), (t.double(), label, numbers.double(), weights.double())
    expected = kl_gradient_reference(wide, *others, *words[3:], torch.float64)
    assert_gradient(run.arguments[0], wide, narrow)
    assert_sums(run.result, expected, dtype)
    return run.launches


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "reverse"), [*product((1.0, 2.0), (False, True))])
def test_sums_over_the_whole_vocabulary(host, temperature, reverse, dtype):
    launches = partials(host, pair(2, VOCABULARY, dtype), temperature, reverse, order=1)
    assert [launch.grid for launch in launches] == [(2, 1, 1)] * 2


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_over_the_whole_vocabulary(host, direction, dtypes):
    given = pair(2, VOCABULARY, dtypes[0])
    gradient(host, given, dtypes[1], 2.0, direction, order=1)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_type_of_odd_rows(host, dtypes):
    for width in (2_307, 1):
        given = pair(2, width, dtypes[0])
        partials(host, given, 1.0, False)
        gradient(host, given, dtypes[1], 1.0, "forward", order=2)


@pytest.mark.parametrize("place", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_may_begin_anywhere_and_labels_have_strides(host, dtype, place):
    z, t, label = pair(2, 2_320, dtype)
    z, t = (displaced(z), t) if place == 0 else (z, displaced(t))
    partials(host, (z, t, strided(label)), 2.0, True)
    gradient(host, (z, t, strided(label)), dtype, 2.0, "jsd")


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
def test_nothing_is_as_in_the_definition(host, shape):
    z, label = torch.empty(shape), torch.full(shape[:1], -1)
    numbers, weights = torch.ones(4, shape[0]), torch.ones(3, shape[0])
    words = z, z, label, 1.0, False
    run = host.run(H200, "kl_partials", *words)
    torch.testing.assert_close(run.result, kl_partials_reference(*words))
    words = z, z, numbers[0], numbers[1], 1.0, BETA
    run = host.run(H200, "jsd_partials", *words)
    torch.testing.assert_close(run.result, jsd_partials_reference(*words))
    words = z, z, label, numbers, weights, 1.0, "forward", BETA, torch.bfloat16
    run = host.run(H200, "kl_gradient_", *words)
    torch.testing.assert_close(run.result, kl_gradient_reference(*words))


def test_a_pair_that_differs_and_an_unknown_direction_are_refused(host):
    z, t, label = pair(2, 64, torch.float32)
    with pytest.raises(RuntimeError, match="one type and shape"):
        host.run(H200, "kl_partials", z, t.double(), label, 1.0, False)
    with pytest.raises(RuntimeError, match="direction is 'sideways'"):
        gradient(host, (z, t, label), torch.float32, 1.0, "sideways")
