from megatron_mlr1.teacher.keys import StudentKeys
from megatron_mlr1.teacher.pool import Lease
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.status import ask_all, table
from megatron_mlr1.teacher.wire import Kind
from tests.support.teachers import RawStudent, TableTeacher, make_keys, make_request, serving


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
    assert lines[3] == "gone at tcp://127.0.0.1:9: silent"


def test_without_the_students_key_nothing_is_heard(tmp_path):
    pool, _ = make_keys(tmp_path / "keys")
    with serving(TableTeacher(), keys=pool) as replica:
        (report,) = ask_all([Lease(name="one", endpoint=replica.endpoint)], None)
    assert report.problem == "silent"


def test_an_empty_pool_has_an_empty_table():
    assert "0 of 0 replicas answer" in table(ask_all([], None))
