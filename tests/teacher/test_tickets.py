import threading

import numpy as np
import pytest

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.spec import TargetRequest, Targets, TargetSpec
from megatron_mlr1.teacher.tickets import TicketTable, most_urgent

TARGETS = Targets(TargetSpec(), {"hidden": np.zeros((2, 1), "<f4")})
REQUEST = TargetRequest(np.array([1, 2], "<i4"), np.array([0, 2], "<i4"), TargetSpec())


def opened(table, key=b"k" * 16, deadline=0):
    return table.open(key, REQUEST, deadline, 8, False)


def test_a_ticket_waits_for_its_targets_and_is_served_once():
    table = TicketTable()
    ticket, work = opened(table)
    assert not table.ready(ticket)
    threading.Timer(0.05, table.finish, (work, TARGETS, None)).start()
    targets, last = table.take(ticket, 10)
    assert targets is TARGETS
    assert last is work
    assert table.works() == []
    assert table.wait_s > 0.01
    with pytest.raises(AssertionError, match="once"):
        table.take(ticket, 0)


def test_tickets_of_one_key_share_work_until_the_last_is_served():
    table = TicketTable()
    one, work = opened(table)
    other, none = opened(table, deadline=5)
    assert none is None
    table.finish(work, TARGETS, None)
    assert table.take(one, 0)[1] is None
    assert table.find(one.key) is work
    assert table.drop(other) is work


def test_a_timeout_leaves_the_ticket_open_and_an_error_reaches_whoever_waits():
    table = TicketTable()
    ticket, work = opened(table)
    with pytest.raises(TeacherUnavailable):
        table.take(ticket, 0.01)
    table.finish(work, None, TeacherError("this one is ill"))
    for ask in (table.ready, lambda one: table.take(one, 0)):
        with pytest.raises(TeacherError, match="ill"):
            ask(ticket)


def test_what_was_taken_cannot_be_taken_back():
    table = TicketTable()
    ticket, work = opened(table)
    table.finish(work, TARGETS, None)
    assert table.reopen(work)
    assert not table.ready(ticket)
    table.finish(work, TARGETS, None)
    table.take(ticket, 0)
    assert not table.reopen(work)


def test_a_failure_of_the_whole_client_reaches_all_tickets():
    table = TicketTable()
    ticket, _ = opened(table)
    threading.Timer(0.05, table.fail, (TeacherError("all is lost"),)).start()
    with pytest.raises(TeacherError, match="all is lost"):
        table.take(ticket, 10)
    with pytest.raises(TeacherError, match="all is lost"):
        table.ready(ticket)


def test_urgent_work_comes_first_and_older_work_before_newer():
    table = TicketTable()
    works = [opened(table, bytes([i]) * 16, deadline)[1] for i, deadline in enumerate((3, 1, 1))]
    assert most_urgent(works) == [works[1], works[2], works[0]]
