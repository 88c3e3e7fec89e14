"""`examples/pretraining_cluster/train.sbatch` in a SLURM of shell scripts."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "pretraining_cluster" / "train.sbatch"
STEP = 'mkdir -p "$CHECKPOINTS/950m/pretrain_phase1"; echo {} >>"$CHECKPOINTS/$RECORD"; '


@pytest.fixture
def submit(tmp_path):
    """Give what runs the script where `srun` does what it is told; gives what was printed."""

    def submit(srun, **variables):
        programs = {
            "srun": srun,
            "scontrol": 'if [[ $1 == show ]]; then echo node0; else echo "scontrol $*"; fi',
            # The script's own would end other trainings of this machine.
            "pkill": 'echo "pkill $*"',
        }
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in programs.items():
            path = tmp_path / "bin" / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "DATA_ROOT": str(tmp_path),
            "CHECKPOINTS": str(tmp_path / "checkpoints"),
            "RECORD": "950m/pretrain_phase1/metrics.jsonl",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_NNODES": "1",
        }
        done = subprocess.run(
            ["bash", str(SCRIPT)],
            capture_output=True,
            text=True,
            check=False,
            env=environment | variables,
        )
        return done.returncode, done.stdout

    return submit


def test_a_run_that_is_done_is_not_queued_again(submit):
    status, printed = submit(STEP + "exit 0")
    assert status == 0
    assert "queued again" not in printed


def test_a_run_that_fails_after_a_step_is_queued_again_so_often(submit):
    for restarts, again in (("", True), ("19", True), ("20", False)):
        status, printed = submit(STEP + "exit 1", SLURM_RESTART_COUNT=restarts)
        assert status == 1
        assert ("scontrol requeue 7" in printed) == again


@pytest.mark.parametrize("before", ["", STEP], ids=["new", "resumed"])
def test_a_run_that_fails_before_its_first_step_is_not_queued_again(submit, before):
    submit(before + "exit 0")
    status, printed = submit("exit 1")
    assert status == 1
    assert "before its first step; not queued again" in printed
    assert "scontrol" not in printed


def test_a_run_that_is_told_to_stop_is_queued_again(submit):
    status, printed = submit("kill -TERM $PPID; sleep 1; exit 0")
    assert status == 0
    assert "told to stop" in printed
    assert "pkill -TERM" in printed
    assert "scontrol requeue 7" in printed
