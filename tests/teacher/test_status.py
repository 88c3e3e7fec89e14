import socket

import pytest
import zmq

from megatron_mlr1.teacher.keys import StudentKeys
from megatron_mlr1.teacher.pool import AddressPool, FolderPool, Lease
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.status import ask_all, show, table
from megatron_mlr1.teacher.wire import Kind
from tests.support.teachers import RawStudent, TableTeacher, make_keys, make_request, serving


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


HAS_IPV6 = has_ipv6()


def test_the_table_has_what_every_replica_says_and_who_is_silent(tmp_path):
    pool, student = make_keys(tmp_path / "keys")
    with (
        serving(TableTeacher(), keys=pool, name="one") as replica,
        RawStudent(replica.endpoint, student, pool.pair.public) as asking,
    ):
        asking.hello()
        asking.submit(make_request((30,), TargetSpec()))
        assert [asking.receive().kind for _ in range(2)] == [Kind.ACCEPT, Kind.DATA]
        leases = [
            Lease(name="one", endpoint=replica.endpoint),
            Lease(name="gone", endpoint="tcp://127.0.0.1:9"),
        ]
        reports = ask_all(leases, StudentKeys(student, pool.pair.public))
    fields = reports[0].fields
    assert (fields["requests"], fields["tokens"], fields["students"]) == (1, 30, 2)
    assert fields["bytes_sent"] == 30 * 8 * 4
    assert 0 < fields["p50_ms"] <= fields["p99_ms"]
    assert reports[1].fields is None
    lines = table(reports).splitlines()
    assert "tokens/s" in lines[0]
    assert "one" in lines[1]
    assert lines[2].startswith("1 of 2 replicas answer")
    assert lines[3] == "gone at tcp://127.0.0.1:9: nobody listens there"


def test_without_the_students_key_nothing_is_heard_and_the_reason_is_told(tmp_path):
    pool, student = make_keys(tmp_path / "keys")
    _, stranger = make_keys(tmp_path / "others")
    others = zmq.curve_keypair()[0]
    with serving(TableTeacher(), keys=pool) as replica:
        lease = Lease(name="one", endpoint=replica.endpoint)
        (none,) = ask_all([lease], None)
        (unknown,) = ask_all([lease], StudentKeys(stranger, pool.pair.public))
        (misled,) = ask_all([lease], StudentKeys(student, others))
    assert "one side has no keys" in none.problem
    assert "does not know this student's key" in unknown.problem
    assert "the pool's public key here is not its own" in misled.problem
    assert (none.fields, unknown.fields, misled.fields) == (None, None, None)


def test_who_takes_connections_and_says_nothing_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        (report,) = ask_all([Lease(name="mute", endpoint=endpoint)], None)
    assert report.problem == "silent"


def test_an_address_that_is_none_does_not_hide_the_others():
    with serving(TableTeacher(), name="one") as replica:
        leases = [
            Lease(name="none", endpoint=f"ipc:///{'x' * 200}"),
            Lease(name="one", endpoint=replica.endpoint),
        ]
        none, one = ask_all(leases, None)
    assert "no address" in none.problem
    assert one.fields is not None


@pytest.mark.skipif(not HAS_IPV6, reason="this machine has no loopback of IPv6")
def test_a_replica_is_reached_by_ipv6():
    with serving(TableTeacher(), bind="tcp://[::1]:*") as replica:
        (report,) = ask_all([Lease(name="one", endpoint=replica.endpoint)], None)
    assert report.fields is not None


def test_an_empty_pool_has_an_empty_table_and_says_why(tmp_path):
    pool = FolderPool(tmp_path)
    told, num_answers = show(pool, None)
    assert "0 of 0 replicas answer; 0 tokens/s in all" in told
    assert told.endswith("holds no lease: no replica has come, or all left.")
    assert num_answers == 0
    (tmp_path / "x.lease").write_text("")
    assert show(pool, None)[0].endswith("that are no lease of this version: 1.")


def test_who_answers_is_counted():
    with serving(TableTeacher(), name="one") as replica:
        pool = AddressPool((replica.endpoint, "tcp://127.0.0.1:9"))
        told, num_answers = show(pool, None)
    assert "1 of 2 replicas answer" in told
    assert num_answers == 1
