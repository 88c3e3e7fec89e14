import pytest

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.backend import TeacherUnavailable
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.store import StoredTeacher, make_store, open_store
from megatron_mlr1.teacher.tiered import TieredTeacher
from tests.support.teacher_targets import TableTeacher, identity_of, random_request


def store_in(folder):
    return make_store(folder, identity_of(1000), TargetSpec())


def learn(teacher, seeds):
    requests = [random_request(seed, vocab_size=1000) for seed in seeds]
    tickets = [teacher.submit(request, place) for place, request in enumerate(requests)]
    assert all(teacher.ready(ticket) for ticket in tickets)
    return [bits(teacher.fetch(ticket, 0)) for ticket in tickets]


@pytest.fixture
def table():
    return TableTeacher(identity_of(1000))


def test_what_is_missing_is_asked_for_once_and_stored(tmp_path, table):
    expected = learn(TableTeacher(identity_of(1000)), range(6))
    first = TieredTeacher(store_in(tmp_path), lambda: table)
    assert learn(first, range(4)) == expected[:4]
    first.close()
    assert table.is_closed
    second_table = TableTeacher(identity_of(1000))
    second = TieredTeacher(store_in(tmp_path), lambda: second_table)
    assert learn(second, range(6)) == expected
    figures = second.statistics()
    assert (figures["requests"], figures["from_store"]) == (6, 4)
    assert second_table.statistics()["requests"] == 2
    second.close()
    assert learn(StoredTeacher(open_store(tmp_path)), reversed(range(6))) == expected[::-1]


def test_a_store_that_holds_everything_needs_no_teacher(tmp_path, table):
    first = TieredTeacher(store_in(tmp_path), lambda: table)
    expected = learn(first, range(4))
    whole = first.head(0, 1000)
    first.close()

    def connect():
        raise TeacherUnavailable("nobody is there. Start someone.")

    second = TieredTeacher(store_in(tmp_path), connect)
    assert learn(second, range(4)) == expected
    assert (second.head(0, 1000) == whole).all()
    with pytest.raises(TeacherUnavailable):
        learn(second, [99])
    second.close()


def test_what_was_flushed_is_there_for_a_run_that_starts_again(tmp_path, table):
    killed = TieredTeacher(store_in(tmp_path), lambda: table)
    learn(killed, range(3))
    killed.flush()
    learn(killed, range(3, 5))
    again = TieredTeacher(store_in(tmp_path), lambda: TableTeacher(identity_of(1000)))
    learn(again, range(5))
    assert again.statistics()["from_store"] == 3
    killed.close()
    again.close()


def test_targets_that_did_not_come_leave_the_ticket_good(tmp_path, table):
    teacher = TieredTeacher(store_in(tmp_path), lambda: table)
    ticket = teacher.submit(random_request(1, vocab_size=1000), 0)
    table.is_there = False
    assert not teacher.ready(ticket)
    with pytest.raises(TeacherUnavailable):
        teacher.fetch(ticket, 0)
    table.is_there = True
    teacher.fetch(ticket, 0)
    teacher.close()


def test_dropped_tickets_store_nothing(tmp_path, table):
    teacher = TieredTeacher(store_in(tmp_path), lambda: table)
    teacher.drop(teacher.submit(random_request(1, vocab_size=1000), 0))
    teacher.close()
    assert open_store(tmp_path).num_records == 0
    assert table.statistics()["in_flight"] == 0


def test_a_store_that_cannot_be_written_stops_the_run(tmp_path, table):
    store = store_in(tmp_path / "store")
    teacher = TieredTeacher(store, lambda: table)
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    (tmp_path / "store").rmdir()
    with pytest.raises(MachineError, match="room"):  # noqa: PT012 - one of them, not a certain one
        learn(teacher, range(50))
        teacher.flush()
    with pytest.raises(TeacherError, match="has one form"):
        teacher.submit(random_request(1, TargetSpec(form="top_k", k=2)), 0)
