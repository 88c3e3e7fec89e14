"""A supervisor with two real replicas: each process imports torch, so one test has them all."""

import os
import signal
import threading
import time

import pytest

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher.pool import FolderPool
from megatron_mlr1.teacher.serving import ServePlan
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.supervisor import Supervisor
from megatron_mlr1.teacher.wire import Kind
from tests.support.teachers import RawStudent, make_keys, make_request

PATIENCE_S = 180


@pytest.fixture(autouse=True)
def package_is_found(monkeypatch, pytestconfig):
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))


def wait_for(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def children():
    """Process numbers of this process's replicas."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline") as file:
                words = file.read().split("\0")
            with open(f"/proc/{number}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and "megatron_mlr1.teacher.process" in words:
            found.append(int(number))
    return sorted(found)


def answer(lease, keys, own):
    """All bytes that a replica gives for one request."""
    with RawStudent(lease.endpoint, own, keys.pair.public) as student:
        assert student.hello().kind is Kind.HELLO_ACK
        student.submit(make_request((20, 13), TargetSpec()))
        assert student.receive().kind is Kind.ACCEPT
        data = student.receive()
        assert data.kind is Kind.DATA
        return [bytes(frame) for frame in data.frames]


def test_a_killed_replica_comes_back_and_all_answer_with_the_same_bits(teacher_folder, tmp_path):
    keys, own = make_keys(tmp_path / "keys")
    plan = ServePlan(
        model=teacher_folder,
        devices=("cpu", "cpu"),
        bind="tcp://127.0.0.1:*",
        pool=tmp_path / "pool",
        keys=tmp_path / "keys",
        dtype="float32",
    )
    (tmp_path / "pool").mkdir()
    pool = FolderPool(tmp_path / "pool")
    lines = []
    supervisor = Supervisor(plan, lines.append)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        wait_for(lambda: len(pool.leases()) == 2)
        first, second = pool.leases()
        assert first.fingerprint == second.fingerprint
        expected = answer(first, keys, own)
        assert answer(second, keys, own) == expected

        killed, kept = children()
        os.kill(killed, signal.SIGKILL)
        names = {first.name, second.name}
        wait_for(lambda: any(lease.name not in names for lease in pool.leases()))
        (fresh,) = [lease for lease in pool.leases() if lease.name not in names]
        assert answer(fresh, keys, own) == expected
        assert any("signal 9" in line for line in lines)
        assert kept in children(), "the other one was left alone"
    finally:
        supervisor.drain()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert children() == []
    ended = [line for line in lines if "ended with" in line]
    assert [line for line in ended if "signal 9" not in line] == [], "a drained one ends with 0"
    living = {lease.name for lease in pool.leases()}
    assert living <= {first.name, second.name}, "only the killed one left a lease"
    assert len(living) <= 1


def test_a_replica_that_can_never_start_ends_the_supervisor(tmp_path, capfd):
    plan = ServePlan(
        model=tmp_path / "missing",
        devices=("cpu",),
        bind=f"ipc://{tmp_path}/socket",
        pool=None,
        keys=None,
        insecure_loopback=True,
    )
    with pytest.raises(TeacherError, match="cannot start"):
        Supervisor(plan, print).run()
    assert "missing is no folder" in capfd.readouterr().err


def test_a_pool_that_cannot_be_written_is_refused_before_a_teacher_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    plan = ServePlan(
        model=tmp_path / "missing",
        devices=("cpu",),
        bind=f"ipc://{tmp_path}/socket",
        pool=tmp_path / "file" / "pool",
        keys=None,
        insecure_loopback=True,
    )
    lines = []
    with pytest.raises(MachineError, match="A pool is a folder that all replicas can write"):
        Supervisor(plan, lines.append).run()
    assert lines == []
    assert children() == []
