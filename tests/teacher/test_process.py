import json
import os
import subprocess
import sys

import pytest

from megatron_mlr1.teacher.fp8_gate import Gate
from megatron_mlr1.teacher.serving import ServePlan, place_of
from megatron_mlr1.teacher.wire import Kind
from tests.support.teachers import RawStudent


@pytest.fixture
def start(teacher_folder, tmp_path, pytestconfig):
    """Give what starts a replica's process as a supervisor does."""

    def start(**changes):
        plan = ServePlan(
            model=teacher_folder,
            devices=("cpu",),
            bind=f"ipc://{tmp_path}/socket",
            pool=tmp_path / "pool",
            keys=None,
            insecure_loopback=True,
            **changes,
        )
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megatron_mlr1.teacher.process",
                json.dumps(place_of(plan, 0)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
        )

    return start


def test_a_replica_in_fp8_tells_its_drift_and_drains_without_its_supervisor(start, tmp_path):
    replica = start(fp8=Gate(max_kl=10.0, min_agreement=0.0))
    first_line = replica.stdout.readline()
    assert f"serves at ipc://{tmp_path}/socket; FP8 moves the distribution by " in first_line
    with RawStudent(f"ipc://{tmp_path}/socket") as student:
        assert student.hello().kind is Kind.HELLO_ACK
        assert student.identity.numerics.startswith("fp8-e4m3 ")
        replica.stdin.close()
        assert student.receive().kind is Kind.GOAWAY
    assert replica.wait(60) == 0
    assert not list((tmp_path / "pool").glob("*.lease")), "its lease is gone"


def test_a_replica_whose_supervisor_died_while_it_loaded_ends_without_a_word(start, tmp_path):
    replica = start()
    replica.stdin.close()
    replica.stdout.close()
    with replica.stderr:
        assert "Error" not in replica.stderr.read()
    assert replica.wait(60) == 0
    assert not list((tmp_path / "pool").glob("*.lease")), "it left no lease"
