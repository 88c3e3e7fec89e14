import threading

import numpy as np

from megatron_mlr1.teacher.spec import Targets, TargetSpec
from megatron_mlr1.teacher.work import ResultRing, Waiter, WorkQueue
from tests.support.teachers import make_request

REQUEST = make_request((10,), TargetSpec())


def waiter(student=b"s", request=1):
    return Waiter(student, request, 0.0, 100)


def test_the_earliest_deadline_comes_first():
    queue = WorkQueue(1000)
    for key, deadline in ((b"late", 3.0), (b"soon", 1.0), (b"then", 2.0)):
        queue.add(key, REQUEST, deadline, waiter())
    assert [queue.take().key for _ in range(3)] == [b"soon", b"then", b"late"]


def test_equal_deadlines_come_in_the_order_of_their_arrival():
    queue = WorkQueue(1000)
    for key in (b"1", b"2", b"3"):
        queue.add(key, REQUEST, 1.0, waiter())
    assert [queue.take().key for _ in range(3)] == [b"1", b"2", b"3"]


def test_a_second_request_for_a_key_joins_the_first_and_can_hurry_it():
    queue = WorkQueue(1000)
    queue.add(b"a", REQUEST, 5.0, waiter(b"one"))
    queue.add(b"b", REQUEST, 3.0, waiter(b"one", 2))
    assert queue.add(b"a", REQUEST, 1.0, waiter(b"two"))
    assert (len(queue), queue.tokens) == (2, 20)
    job = queue.take()
    assert job.key == b"a"
    assert not queue.add(b"c", REQUEST, 0.0, waiter())
    assert queue.add(b"a", REQUEST, 0.0, waiter(b"three")), "it joins while it is computed"
    assert {w.student for w in queue.finish(job)} == {b"one", b"two", b"three"}
    assert [queue.take().key for _ in range(2)] == [b"c", b"b"]


def test_the_queue_is_bounded_in_tokens_but_takes_one_long_request():
    queue = WorkQueue(15)
    assert queue.has_room(b"x", 100)
    queue.add(b"a", REQUEST, 1.0, waiter())
    assert not queue.has_room(b"x", 6)
    assert queue.has_room(b"x", 5)
    assert queue.has_room(b"a", 10), "it joins"
    queue.finish(queue.take())
    assert queue.tokens == 0


def test_a_job_that_nobody_waits_for_is_not_computed():
    queue = WorkQueue(1000)
    queue.add(b"a", REQUEST, 1.0, waiter(b"one"))
    queue.add(b"a", REQUEST, 1.0, waiter(b"two"))
    queue.add(b"b", REQUEST, 2.0, waiter(b"one", 2))
    assert queue.cancel(b"a", b"one", 1) == waiter(b"one")
    assert queue.tokens == 20
    assert queue.cancel(b"a", b"two", 1) == waiter(b"two")
    assert queue.cancel(b"a", b"two", 1) is None
    assert queue.tokens == 10
    assert queue.take().key == b"b"


def test_a_job_that_runs_already_is_finished_although_it_was_cancelled():
    queue = WorkQueue(1000)
    queue.add(b"a", REQUEST, 1.0, waiter())
    job = queue.take()
    queue.cancel(b"a", b"s", 1)
    assert queue.finish(job) == []
    assert len(queue) == 0


def test_a_finished_job_that_is_not_delivered_yet_is_not_computed_again():
    queue = WorkQueue(1000)
    queue.add(b"a", REQUEST, 1.0, waiter())
    first = queue.take()
    queue.add(b"b", REQUEST, 1.0, waiter(request=2))
    queue.take()
    queue.add(b"a", REQUEST, 0.0, waiter(b"late"))
    queue.add(b"c", REQUEST, 9.0, waiter(request=3))
    assert queue.take().key == b"c"
    assert len(queue.finish(first)) == 2


def test_taking_waits_for_work_and_ends_when_the_queue_stops():
    queue = WorkQueue(1000)
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(iter(queue.take, None)))
    thread.start()
    queue.add(b"a", REQUEST, 1.0, waiter())
    queue.stop()
    thread.join(5)
    assert [job.key for job in taken] == [b"a"]


def targets(num_bytes):
    return Targets(TargetSpec(), {"hidden": np.zeros((num_bytes // 4, 1), "<f4")})


def test_the_ring_keeps_what_was_used_last():
    ring = ResultRing(300)
    first = targets(100)
    ring.put(b"a", first)
    ring.put(b"b", targets(100))
    assert ring.get(b"a") is first
    ring.put(b"c", targets(120))
    assert ring.get(b"b") is None
    assert ring.get(b"a") is first
    ring.put(b"huge", targets(400))
    assert ring.get(b"huge") is None
    assert ring.get(b"c") is not None
