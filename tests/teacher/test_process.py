import json
import os
import subprocess
import sys

from megatron_mlr1.teacher.fp8_gate import Gate
from megatron_mlr1.teacher.serving import ServePlan, place_of
from megatron_mlr1.teacher.wire import Kind
from tests.support.teachers import RawStudent


def test_a_replica_in_fp8_tells_its_drift_and_drains_without_its_supervisor(
    teacher_folder, tmp_path, pytestconfig
):
    plan = ServePlan(
        model=teacher_folder,
        devices=("cpu",),
        bind=f"ipc://{tmp_path}/socket",
        pool=tmp_path / "pool",
        keys=None,
        fp8=Gate(max_kl=10.0, min_agreement=0.0),
        insecure_loopback=True,
    )
    place = json.dumps(place_of(plan, 0, 0))
    replica = subprocess.Popen(
        [sys.executable, "-m", "megatron_mlr1.teacher.process", place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
    )
    first_line = replica.stdout.readline()
    assert f"serves at ipc://{tmp_path}/socket; FP8 moves the distribution by " in first_line
    with RawStudent(f"ipc://{tmp_path}/socket") as student:
        assert student.hello().kind is Kind.HELLO_ACK
        assert student.identity.numerics.startswith("fp8-e4m3 ")
        replica.stdin.close()
        assert student.receive().kind is Kind.GOAWAY
    assert replica.wait(60) == 0
    assert not list((tmp_path / "pool").iterdir()), "its lease is gone"
