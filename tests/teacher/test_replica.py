"""A replica over real sockets; its teacher is a table, so nothing here needs torch."""

import os
import threading
import time

import numpy as np
import pytest

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher import payloads
from megatron_mlr1.teacher.keys import make_pair, read_pair
from megatron_mlr1.teacher.pool import FolderPool
from megatron_mlr1.teacher.replica import MAX_FAILURES, Replica, ReplicaOptions
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec
from megatron_mlr1.teacher.wire import Code, Kind, Message, encode, read_error
from tests.support.teachers import (
    MANY_BYTES,
    PATIENCE_S,
    RawStudent,
    TableTeacher,
    make_keys,
    make_request,
    serving,
)

REQUEST = make_request((10, 6), TargetSpec())
ROW_BYTES = 8 * 4


@pytest.fixture
def teacher():
    return TableTeacher()


@pytest.fixture
def replica(teacher):
    with serving(teacher) as replica:
        yield replica


@pytest.fixture
def student(replica):
    with RawStudent(replica.endpoint) as student:
        student.hello()
        yield student


def others(count):
    return [make_request((16,), TargetSpec(), seed=seed) for seed in range(1, count + 1)]


def hidden_of(message, student, request=REQUEST):
    assert message.kind is Kind.DATA, message
    targets = payloads.read_data(message, request.spec, student.identity, request.rows)
    return targets.arrays["hidden"]


def test_a_student_gets_the_targets_of_its_tokens(student, teacher):
    key = student.submit(REQUEST, number=42)
    accepted, data = student.receive(), student.receive()
    assert (accepted.kind, accepted.request, accepted.key) == (Kind.ACCEPT, 42, key)
    assert (data.request, data.key, data.teacher) == (42, key, teacher.identity.short)
    np.testing.assert_array_equal(hidden_of(data, student), teacher.table[REQUEST.tokens])


def test_the_greeting_names_the_teacher(student, teacher):
    assert student.identity == teacher.identity


@pytest.mark.parametrize(
    "wanted",
    [{"fingerprint": "9" * 32}, {"tokenizer_sha256": "cd" * 32}, {"vocab_size": 99}],
    ids=lambda wanted: next(iter(wanted)),
)
def test_a_student_that_wants_another_teacher_is_refused(replica, wanted):
    with RawStudent(replica.endpoint) as student:
        code, text = read_error(student.hello(**wanted))
        assert code is Code.WRONG_TEACHER
        assert next(iter(wanted)) in text
        student.send(Kind.PING)
        assert read_error(student.receive())[0] is Code.NO_HELLO


def test_a_request_before_the_greeting_is_refused(replica):
    with RawStudent(replica.endpoint) as student:
        student.send(Kind.SUBMIT, *payloads.submit_frames(REQUEST, 0), request=5)
        answer = student.receive()
        assert (read_error(answer)[0], answer.request) == (Code.NO_HELLO, 5)


def test_a_second_request_of_a_key_is_answered_from_kept_results(replica, student, teacher):
    student.submit(REQUEST)
    first = hidden_of([student.receive() for _ in range(2)][1], student).tobytes()
    with RawStudent(replica.endpoint) as other:
        other.hello()
        other.submit(REQUEST, number=9)
        assert hidden_of(other.receive(), other).tobytes() == first
    assert len(teacher.answered) == 1
    assert student.stats()["from_ring"] == 1


def test_two_students_share_a_computation_in_flight(replica, student, teacher):
    teacher.gate.clear()
    with RawStudent(replica.endpoint) as other:
        other.hello()
        for asking in (student, other):
            asking.submit(REQUEST)
            assert asking.receive().kind is Kind.ACCEPT
        teacher.gate.set()
        for asking in (student, other):
            hidden_of(asking.receive(), asking)
    assert len(teacher.answered) == 1
    assert student.stats()["joined"] == 1


def test_a_request_that_is_sent_twice_is_answered_once(student, teacher):
    teacher.gate.clear()
    for _ in range(3):
        student.submit(REQUEST, number=5)
    student.send(Kind.PING)
    kinds = [student.receive().kind for _ in range(2)]
    assert kinds == [Kind.ACCEPT, Kind.PONG], "all three have come, and one was taken"
    teacher.gate.set()
    hidden_of(student.receive(), student)
    student.send(Kind.PING)
    assert student.receive().kind is Kind.PONG, "no second answer came before it"


def test_the_earliest_deadline_is_computed_first(student, teacher):
    teacher.gate.clear()
    student.submit(REQUEST, number=0)
    keys = [
        student.submit(request, number=number, deadline_ms=deadline)
        for number, (request, deadline) in enumerate(
            zip(others(3), (9000, 1000, 5000), strict=True), 1
        )
    ]
    for _ in range(4):
        assert student.receive().kind is Kind.ACCEPT
    teacher.gate.set()
    assert [student.receive().request for _ in range(4)] == [0, 2, 3, 1]
    assert teacher.answered[1:] == [keys[1], keys[2], keys[0]]


def test_a_full_queue_says_when_to_ask_again(teacher):
    teacher.gate.clear()
    with serving(teacher, max_queue_tokens=40) as replica, RawStudent(replica.endpoint) as student:
        student.hello()
        for number, request in enumerate(others(3)):
            student.submit(request, number=number)
        kinds = [student.receive() for _ in range(3)]
        assert [message.kind for message in kinds] == [Kind.ACCEPT, Kind.ACCEPT, Kind.BUSY]
        assert kinds[2].request == 2
        assert 0 < kinds[2].value <= 5000
        teacher.gate.set()
        assert {student.receive().request for _ in range(2)} == {0, 1}
        student.submit(others(3)[2], number=2)
        assert [student.receive().kind for _ in range(2)] == [Kind.ACCEPT, Kind.DATA]


def test_nothing_is_sent_that_the_students_credit_does_not_cover(replica, teacher):
    with RawStudent(replica.endpoint) as student:
        student.hello(credit=0)
        one, two = others(2)
        student.submit(one, number=1, credit=16 * ROW_BYTES)
        student.submit(two, number=2, credit=16 * ROW_BYTES)
        kinds = [student.receive().kind for _ in range(3)]
        assert sorted(kinds) == [Kind.ACCEPT, Kind.ACCEPT, Kind.DATA]
        assert not student.hears()
        student.send(Kind.PING, value=2 * 16 * ROW_BYTES)
        assert {student.receive().kind for _ in range(2)} == {Kind.PONG, Kind.DATA}


def test_promised_replies_are_bounded_in_bytes(teacher):
    with (
        serving(teacher, held_bytes=40 * ROW_BYTES) as replica,
        RawStudent(replica.endpoint) as student,
    ):
        student.hello(credit=0)
        for number, request in enumerate(others(3)):
            student.submit(request, number=number, credit=0)
        kinds = [student.receive().kind for _ in range(3)]
        assert kinds == [Kind.ACCEPT, Kind.ACCEPT, Kind.BUSY]
        student.send(Kind.PING, value=MANY_BYTES)
        assert {student.receive().kind for _ in range(3)} == {Kind.PONG, Kind.DATA}


def test_a_cancelled_request_is_not_computed(student, teacher):
    teacher.gate.clear()
    student.submit(REQUEST, number=1)
    unwanted, wanted = others(2)
    unwanted_key = student.submit(unwanted, number=2)
    student.submit(wanted, number=3)
    student.send(Kind.CANCEL, request=2)
    for _ in range(3):
        assert student.receive().kind is Kind.ACCEPT
    assert student.stats()["cancelled"] == 1
    teacher.gate.set()
    assert [student.receive().request for _ in range(2)] == [1, 3]
    assert unwanted_key not in teacher.answered


def test_states_that_are_not_finite_are_an_error_and_never_data(student, teacher):
    teacher.table[REQUEST.tokens[3]] = np.nan
    for number in (1, 2):  # nothing wrong is kept either
        student.submit(REQUEST, number=number)
        assert student.receive().kind is Kind.ACCEPT
        answer = student.receive()
        assert (read_error(answer)[0], answer.request) == (Code.NOT_FINITE, number)


def test_a_request_that_the_teacher_cannot_answer_is_an_error(student):
    wrong = TargetRequest(np.array([1, 999], "<i4"), np.array([0, 2], "<i4"), TargetSpec())
    student.submit(wrong)
    assert read_error(student.receive())[0] is Code.WRONG_REQUEST


def test_the_head_comes_in_pieces_with_its_place(student, teacher):
    pieces = []
    for begin, end in ((0, 100), (100, 256)):
        student.send(Kind.HEAD, payloads.head_range_frame(begin, end), value=MANY_BYTES)
        at, rows = payloads.read_head(student.receive(), student.identity)
        assert at == begin
        pieces.append(rows)
    np.testing.assert_array_equal(np.concatenate(pieces), teacher.head)


def test_malformed_truncated_and_oversized_messages_do_not_disturb_others(replica, student):
    good = [bytes(part) for part in encode(Message(kind=Kind.PING))]
    wrong = [
        [b"junk"],
        [good[0][:-1]],
        [b"\0" * 64],
        good + [b"x"] * 40,
        [bytes(part) for part in encode(Message(kind=Kind.SUBMIT, frames=(b"a", b"b")))],
        [bytes(part) for part in encode(Message(kind=Kind.HELLO, frames=(b"{}",)))],
        [bytes(part) for part in encode(Message(kind=Kind.DATA, frames=(b"rows",)))],
    ]
    with RawStudent(replica.endpoint) as peer:
        peer.hello()
        for parts in wrong:
            peer.socket.send_multipart(parts)
            assert read_error(peer.receive())[0] is Code.MALFORMED, parts
    with RawStudent(replica.endpoint) as peer:
        peer.socket.send(bytes(2**20))
        assert not peer.hears(), "the connection is closed without reading it"
    student.submit(REQUEST)
    assert student.receive().kind is Kind.ACCEPT
    hidden_of(student.receive(), student)
    assert student.stats()["refused"] == len(wrong)


def test_a_submission_whose_key_is_not_its_own_is_refused(student):
    frames = payloads.submit_frames(REQUEST, 0)
    student.send(Kind.SUBMIT, *frames, key=bytes(16), request=1)
    assert read_error(student.receive())[0] is Code.MALFORMED


def test_a_message_for_another_teacher_is_refused(student):
    student.send(Kind.PING, teacher=b"another!")
    assert read_error(student.receive())[0] is Code.MALFORMED


def test_a_draining_replica_finishes_what_it_accepted_and_takes_no_more(teacher):
    teacher.gate.clear()
    with serving(teacher) as replica, RawStudent(replica.endpoint) as student:
        student.hello()
        student.submit(REQUEST, number=1)
        assert student.receive().kind is Kind.ACCEPT
        replica.drain()
        farewell = student.receive()
        assert (farewell.kind, farewell.request) == (Kind.GOAWAY, 0)
        student.submit(others(1)[0], number=2)
        refusal = student.receive()
        assert (refusal.kind, refusal.request) == (Kind.GOAWAY, 2)
        with RawStudent(replica.endpoint) as late:
            assert late.hello().kind is Kind.GOAWAY
        teacher.gate.set()
        hidden_of(student.receive(), student)


def test_a_replica_holds_a_lease_while_it_serves(teacher, tmp_path):
    keys, _ = make_keys(tmp_path / "keys")
    with serving(teacher, pool=tmp_path / "pool", keys=keys, name="one") as replica:
        until = time.monotonic() + PATIENCE_S
        while not (tmp_path / "pool" / "one.lease").exists() and time.monotonic() < until:
            time.sleep(0.01)
        (lease,) = FolderPool(tmp_path / "pool").leases()
        assert (lease.name, lease.endpoint) == ("one", replica.endpoint)
        assert lease.fingerprint == teacher.identity.fingerprint
        assert lease.public_key == keys.pair.public.decode()
    assert FolderPool(tmp_path / "pool").leases() == []


def test_a_replica_of_another_teacher_is_refused_before_it_serves(teacher, tmp_path):
    options = {"bind": f"ipc://{tmp_path}/socket", "pool": tmp_path / "pool"}
    with serving(TableTeacher(1), name="one", pool=tmp_path / "pool"):
        with pytest.raises(TeacherError, match="has the replica one of the teacher"):
            Replica(teacher, ReplicaOptions(name="two", **options))
        with serving(TableTeacher(1), name="three", **options):
            pass  # and the address is free again


def test_only_students_whose_key_is_known_hear_anything(teacher, tmp_path):
    keys, known = make_keys(tmp_path / "keys")
    unknown = read_pair(make_pair(tmp_path / "elsewhere", "stranger"))
    with serving(teacher, keys=keys) as replica:
        with RawStudent(replica.endpoint, known, keys.pair.public) as student:
            assert student.hello().kind is Kind.HELLO_ACK
        peers = [(None, None), (unknown, keys.pair.public), (known, unknown.public)]
        for own, pool_key in peers:
            with RawStudent(replica.endpoint, own, pool_key) as peer:
                peer.greet()
                assert not peer.hears()


def test_targets_can_go_over_an_open_port_under_a_seal(teacher, tmp_path):
    keys, known = make_keys(tmp_path / "keys")
    with (
        serving(teacher, keys=keys, data_bind="tcp://127.0.0.1:*") as replica,
        RawStudent(replica.endpoint, known, keys.pair.public) as student,
    ):
        student.attach(student.hello())
        student.submit(REQUEST)
        assert student.receive().kind is Kind.ACCEPT
        rows = hidden_of(student.receive_data(), student)
        np.testing.assert_array_equal(rows, teacher.table[REQUEST.tokens])
        student.send(Kind.PING)
        assert student.receive().kind is Kind.PONG


def test_a_stranger_on_the_open_port_hears_nothing(teacher, tmp_path):
    keys, known = make_keys(tmp_path / "keys")
    with (
        serving(teacher, keys=keys, data_bind="tcp://127.0.0.1:*") as replica,
        RawStudent(replica.endpoint, known, keys.pair.public) as student,
    ):
        fields = payloads.read_fields(student.hello(), payloads.HELLO_ACK_FIELDS)
        token, key = bytes.fromhex(fields["session"]), bytes.fromhex(fields["session_key"])
        attach = Message(kind=Kind.ATTACH, frames=(token,))
        wrong = [
            encode(attach),  # the token without the key
            encode(attach, bytes(32)),
            encode(Message(kind=Kind.ATTACH, frames=(os.urandom(16),)), key),
            encode(Message(kind=Kind.PING, frames=(token,)), key),
            encode(Message(kind=Kind.HELLO)),
            [b"junk"],
        ]
        for parts in wrong:
            with RawStudent(fields["data_endpoint"]) as stranger:
                stranger.socket.send_multipart([bytes(part) for part in parts])
                assert not stranger.hears(within_s=0.1)
        student.submit(REQUEST)
        assert student.receive().kind is Kind.ACCEPT
        assert student.receive().kind is Kind.DATA, "it still comes over the encrypted port"


class BrokenTeacher(TableTeacher):
    """A teacher whose device fails."""

    def targets(self, request, key):
        raise RuntimeError("device lost")


def test_a_device_that_fails_again_and_again_ends_the_replica():
    replica = Replica(BrokenTeacher(), ReplicaOptions(name="r", bind="tcp://127.0.0.1:*"))
    errors = []

    def run():
        try:
            replica.run()
        except MachineError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    with RawStudent(replica.endpoint) as student:
        student.hello()
        for number, request in enumerate(others(MAX_FAILURES)):
            student.submit(request, number=number)
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert "device lost" in str(errors[0])


def test_an_address_that_is_taken_is_an_error(replica):
    with pytest.raises(MachineError, match="cannot be bound"):
        Replica(TableTeacher(), ReplicaOptions(name="r", bind=replica.endpoint))


def test_an_ipc_address_serves_this_machine(teacher, tmp_path):
    with (
        serving(teacher, bind=f"ipc://{tmp_path}/socket") as replica,
        RawStudent(replica.endpoint) as student,
    ):
        assert student.hello().kind is Kind.HELLO_ACK
