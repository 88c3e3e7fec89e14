import numpy as np
import pytest
import torch

from megatron_mlr1.ops.hadamard import rotate
from megatron_mlr1.teacher.forms import arrays_of, as_numpy, sparse_of, states_of
from megatron_mlr1.teacher.spec import Targets, TargetSpec, TeacherIdentity

CPU = torch.device("cpu")
KEY = bytes(range(16))
VOCABULARY, WIDTH, ROWS = 300, 32, 21
IDENTITY = TeacherIdentity(
    fingerprint="0" * 32,
    name="",
    tokenizer_sha256="",
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    dtype="float32",
    numerics="",
)


@pytest.fixture
def states():
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH) / 2


def make(states, spec, key=KEY):
    targets = Targets(spec, arrays_of(*states, spec, key))
    targets.check(IDENTITY, ROWS)
    return targets


def probabilities(states):
    hidden, head = states
    return (hidden.double() @ head.double().T).softmax(1)


def test_hidden_states_come_exactly(states):
    hidden = make(states, TargetSpec()).arrays["hidden"]
    assert torch.equal(states_of(hidden, CPU), states[0])


def test_bfloat16_passes_through_its_bits():
    half = torch.randn(5, 3).bfloat16()
    bits = as_numpy(half)
    assert bits.dtype == np.uint16
    bits.flags.writeable = False
    assert torch.equal(states_of(bits, CPU), half)


def test_int8_times_scale_is_the_rotated_state(states):
    spec = TargetSpec(form="hidden_int8", seed=3)
    arrays = make(states, spec).arrays
    rotated = rotate(states[0], 3).numpy()
    error = np.abs(arrays["hidden"] * arrays["scale"][:, None] - rotated)
    assert (error <= arrays["scale"][:, None] * 0.51).all()
    other = make(states, TargetSpec(form="hidden_int8", seed=4))
    assert not np.array_equal(arrays["hidden"], other.arrays["hidden"])


def test_top_k_has_the_likeliest_ids_and_the_rest_in_one_bucket(states):
    arrays = make(states, TargetSpec(form="top_k", k=5)).arrays
    weights, ids = probabilities(states).topk(5)
    np.testing.assert_array_equal(arrays["ids"], ids)
    np.testing.assert_allclose(arrays["weights"], weights, rtol=1e-5)
    np.testing.assert_allclose(arrays["tail"], 1 - weights.sum(1), rtol=1e-4)


def test_temperature_is_that_of_the_kept_distribution(states):
    arrays = make(states, TargetSpec(form="top_k", k=5, temperature=2.0)).arrays
    hidden, head = states
    softened = (hidden.double() @ head.double().T / 2).softmax(1).topk(5)[0]
    np.testing.assert_allclose(arrays["weights"], softened, rtol=1e-5)


def test_hybrid_draws_the_rest_by_content_key_and_seed(states):
    spec = TargetSpec(form="hybrid", k=4, m=6, seed=1)
    one = make(states, spec)
    again = make(states, spec)
    assert all(np.array_equal(one.arrays[n], again.arrays[n]) for n in one.arrays)
    for other in (
        make(states, spec, bytes(16)),
        make(states, TargetSpec(form="hybrid", k=4, m=6, seed=2)),
    ):
        np.testing.assert_array_equal(one.arrays["ids"][:, :4], other.arrays["ids"][:, :4])
        assert not np.array_equal(one.arrays["ids"], other.arrays["ids"])
    rest = 1 - probabilities(states).topk(4)[0].sum(1)
    np.testing.assert_allclose(one.arrays["tail"], rest / 6, rtol=1e-4)


@pytest.mark.parametrize(
    "spec", [TargetSpec(form="top_k", k=5), TargetSpec(form="hybrid", k=4, m=6, seed=1)]
)
def test_a_loss_gets_weights_that_sum_to_one(states, spec):
    sparse = sparse_of(make(states, spec), CPU)
    total = sparse.weights.sum(1) + sparse.tail
    torch.testing.assert_close(total, torch.ones(ROWS), atol=1e-5, rtol=0)
    assert sparse.ids.shape == (ROWS, spec.k + spec.m)
    assert sparse.ids.dtype == torch.int64
    assert sparse.form.tail_is_bucket == (spec.form == "top_k")
