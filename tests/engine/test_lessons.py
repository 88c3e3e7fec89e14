"""A teacher's answers in the order of the student's hidden states, on the CPU."""

import numpy as np
import pytest
import torch

from megatron_mlr1 import cpu

cpu.activate()

from megatron_mlr1.engine.groups import place  # noqa: E402
from megatron_mlr1.engine.lessons import Lessons  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402
from megatron_mlr1.ops.linear_kl import Objective  # noqa: E402
from megatron_mlr1.teacher.in_process import NullTeacher  # noqa: E402
from megatron_mlr1.teacher.spec import Targets, TargetSpec, layout  # noqa: E402

LENGTH, WIDTH = 4, 3
# Some tokens of two sequences, as context parallelism may leave them.
ROWS = torch.tensor([[3, 0], [7, 4]])
ORDER = [3, 7, 0, 4]
"""Sequence first becomes token first."""


@pytest.fixture(scope="module")
def here():
    with one_process():
        yield place()


def lesson(here, spec):
    """Targets of two sequences in which every number is another one, and what is made of them."""
    identity = NullTeacher(100, WIDTH).identity
    arrays = {
        array.name: np.arange(2 * np.prod(array.shape)).astype(array.dtype).reshape(2, -1)
        for array in layout(spec, identity, LENGTH)
    }
    shapes = {array.name: array.shape for array in layout(spec, identity, LENGTH)}
    targets = [
        Targets(spec, {name: array[n].reshape(shapes[name]) for name, array in arrays.items()})
        for n in range(2)
    ]
    lessons = Lessons(
        identity=identity, spec=spec, objective=Objective(), here=here, sequence_parallel=False
    )
    whole = {
        name: torch.from_numpy(array.reshape(2 * LENGTH, *shapes[name][1:]).astype(np.int64))
        for name, array in arrays.items()
    }
    return lessons.make(targets, ROWS, 0.3), whole


def test_int8_states_and_scales_come_token_first(here):
    made, whole = lesson(here, TargetSpec(form="hidden_int8"))
    assert made.targets.hidden.shape == (2, 2, WIDTH)
    assert torch.equal(made.targets.hidden.flatten(0, 1).long(), whole["hidden"][ORDER])
    assert torch.equal(made.targets.scale.flatten().long(), whole["scale"][ORDER])
    assert made.alpha == 0.3


def test_the_likeliest_ids_come_token_first(here):
    made, whole = lesson(here, TargetSpec(form="top_k", k=2))
    for name in ("ids", "weights", "tail", "entropy"):
        assert torch.equal(getattr(made.targets, name).long(), whole[name][ORDER]), name


def test_each_draw_of_a_token_has_the_tokens_weight(here):
    made, whole = lesson(here, TargetSpec(form="hybrid", k=2, m=3))
    assert torch.equal(made.targets.ids, whole["ids"][ORDER])
    assert torch.equal(made.targets.weights[:, :2].long(), whole["weights"][ORDER])
    draws = made.targets.weights[:, 2:].long()
    assert torch.equal(draws, whole["tail"][ORDER][:, None].expand(-1, 3))
    assert not made.targets.tail.any()
