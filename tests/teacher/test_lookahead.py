import pickle

import numpy as np
import pytest

from megatron_mlr1.errors import DataError, TeacherError
from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.lookahead import Ahead, Lookahead, depth_for, row_requests
from megatron_mlr1.teacher.spec import TargetSpec
from tests.support.teacher_targets import TableTeacher


def batches(count):
    random = np.random.default_rng(0)
    return [random.integers(0, 1000, (2, 12)) for _ in range(count)]


def requests_of(batch):
    return row_requests(batch, None, TargetSpec())


def ahead_of(count, depth=3, teacher=None):
    teacher = teacher or TableTeacher()
    return teacher, Lookahead(iter(batches(count)), requests_of, teacher, depth)


def bits_of(targets):
    return [bits(one) for one in targets]


def test_micro_batches_come_in_order_each_with_its_own_targets():
    teacher, lookahead = ahead_of(7)
    came = []
    for ahead in lookahead:
        targets = lookahead.targets(ahead, 1)
        lookahead.step_done()
        for request, one in zip(requests_of(ahead.batch), targets, strict=True):
            assert bits(one) == bits(teacher.fetch(teacher.submit(request, 0), 0))
        came.append(ahead.batch)
    assert np.array_equal(came, batches(7))
    assert teacher.statistics()["in_flight"] == 0


def test_targets_are_asked_for_so_many_micro_batches_ahead_and_earliest_first():
    teacher, lookahead = ahead_of(20, depth=3)
    assert teacher.statistics()["requests"] == 0
    for step in range(20):
        ahead = next(lookahead)
        assert teacher.statistics()["requests"] == 2 * min(step + 4, 20)
        assert [ticket.deadline for ticket in ahead.tickets] == [step, step]
    with pytest.raises(StopIteration):
        next(lookahead)


def test_at_the_end_of_a_step_all_targets_of_the_next_one_have_been_asked_for():
    teacher, lookahead = ahead_of(20, depth=1)
    assert lookahead.is_ready(4)
    for _ in range(4):
        next(lookahead)
    assert teacher.statistics()["requests"] == 2 * (4 + 4)


def test_a_step_is_ready_when_all_its_targets_are_here():
    teacher, lookahead = ahead_of(10, depth=2)
    teacher.is_there = False
    assert not lookahead.is_ready(5)
    assert teacher.statistics()["requests"] == 10
    teacher.is_there = True
    assert lookahead.is_ready(5)
    teacher.is_there = False
    for _ in range(5):
        assert len(lookahead.targets(next(lookahead), 0)) == 2, "held since the step was ready"
    lookahead.step_done()
    with pytest.raises(TeacherUnavailable):
        lookahead.targets(next(lookahead), 0)
    teacher.is_there = True
    assert lookahead.is_ready(100), "what is left, where the data end"


class IllTeacher(TableTeacher):
    """Cannot be asked for some sequences, and cannot answer for others."""

    def __init__(self, *, unasked=(), unanswered=()):
        super().__init__()
        self.unasked, self.unanswered = unasked, unanswered

    def submit(self, request, deadline):
        if deadline in self.unasked:
            raise TeacherError(f"no targets for {deadline}")
        return super().submit(request, deadline)

    def fetch(self, ticket, timeout_s):
        if ticket.deadline in self.unanswered:
            raise DataError(f"the targets of {ticket.deadline} are broken")
        return super().fetch(ticket, timeout_s)


@pytest.mark.parametrize(
    ("ill", "error"), [({"unasked": {4}}, TeacherError), ({"unanswered": {5}}, DataError)], ids=str
)
def test_what_goes_wrong_ahead_is_said_before_the_step_that_needs_it(ill, error):
    _, lookahead = ahead_of(10, depth=8, teacher=IllTeacher(**ill))
    for _ in range(2):
        assert lookahead.is_ready(2)
        for _ in range(2):
            assert len(lookahead.targets(next(lookahead), 0)) == 2
        lookahead.step_done()
    with pytest.raises(error, match="targets"):
        lookahead.is_ready(2)


def test_a_replayed_micro_batch_gets_the_same_targets_until_its_step_is_done():
    teacher, lookahead = ahead_of(3)
    ahead = next(lookahead)
    first = lookahead.targets(ahead, 1)
    asked = teacher.statistics()["requests"]
    again = lookahead.targets(ahead, 1)
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert teacher.statistics()["requests"] == asked


def test_a_micro_batch_that_another_process_replays_is_asked_for_again():
    _, lookahead = ahead_of(3)
    ahead = next(lookahead)
    before = bits_of(lookahead.targets(ahead, 1))
    moved = pickle.loads(pickle.dumps(ahead))
    assert isinstance(moved, Ahead)
    assert moved.tickets == ()
    teacher, other = ahead_of(0)
    assert bits_of(other.targets(moved, 1)) == before
    assert bits_of(other.targets(moved, 1)) == before
    assert teacher.statistics()["requests"] == 2


def test_the_same_sequence_twice_in_a_micro_batch_is_served_twice():
    batch = np.repeat(batches(1)[0][:1], 2, axis=0)
    lookahead = Lookahead(iter([batch]), requests_of, TableTeacher())
    one, other = lookahead.targets(next(lookahead), 1)
    assert bits(one) == bits(other)


def test_a_micro_batch_whose_targets_nobody_fetched_leaves_nothing_behind():
    teacher, lookahead = ahead_of(4, depth=1)
    next(lookahead)
    lookahead.step_done()
    assert teacher.statistics()["in_flight"] == 2, "those of the next one"
    assert len(lookahead.targets(next(lookahead), 1)) == 2


def test_requests_keep_their_own_copy_of_the_tokens():
    batch = batches(1)[0]
    bounds = [np.array([0, 4, 12]), np.array([0, 12])]
    requests = row_requests(batch, bounds, TargetSpec())
    batch[:] = 0
    assert all(request.tokens.any() for request in requests)
    assert [request.bounds.tolist() for request in requests] == [[0, 4, 12], [0, 12]]


def test_the_depth_covers_the_death_of_a_replica():
    # The figures of an 8B teacher and a 950M student.
    assert depth_for(detect_s=2.0, service_s=0.415, micro_batch_s=0.273) == 10
    assert depth_for(detect_s=0.0, service_s=0.415, micro_batch_s=0.273) == 3
    with pytest.raises(TeacherError, match="1 or more"):
        ahead_of(1, depth=0)
