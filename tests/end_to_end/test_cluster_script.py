"""The jobs of `examples/` for a cluster, in a SLURM of shell scripts."""

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAIN = EXAMPLES / "pretraining_cluster" / "train.sbatch"
POOL = EXAMPLES / "distillation" / "pool.sbatch"
STEP = 'mkdir -p "$CHECKPOINTS/950m/pretrain_phase1"; echo {} >>"$CHECKPOINTS/$RECORD"; '
TEACHERS = """
trap 'echo the teachers are told to drain; exit' TERM
touch "$CHECKPOINTS/950m/midtrain_phase1/pool/a.lease"
while true; do sleep 5; done
"""
"""What serves until it is told to drain."""


@pytest.fixture
def submit(tmp_path):
    """Give what runs a job where `srun` does what it is told; gives what was printed."""

    def submit(srun, script=TRAIN, **variables):
        programs = {
            "srun": srun,
            "scontrol": 'if [[ $1 == show ]]; then echo node0; else echo "scontrol $*"; fi',
            # The script's own would end other trainings of this machine.
            "pkill": 'echo "pkill $*"',
            "sleep": "exec /bin/sleep 0.1",
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
            "SLURM_JOB_NODELIST_HET_GROUP_1": "node0",
            "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
            "LOAD": str(tmp_path),
            "TEACHER": str(tmp_path),
            "KEYS": str(tmp_path),
            "INTERFACE": "lo",
        }
        done = subprocess.run(
            ["bash", str(script)],
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


def distil(submit, *, teachers=TEACHERS, students):
    """Run the job of a pool and its students; `srun --overlap` starts what it is given."""
    step = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    srun = f"case $* in *--het-group=0*) {teachers} ;; *--overlap*) {step} ;; *) {students} ;; esac"
    return submit(srun, POOL)


def test_students_that_are_told_to_stop_save_and_the_teachers_go(submit):
    status, printed = distil(submit, students="kill -TERM $PPID; sleep 1; exit 0")
    assert status == 0
    assert "told to stop" in printed
    assert "pkill -TERM" in printed
    assert "the teachers are told to drain" in printed


def test_the_status_of_the_job_is_the_students(submit):
    status, printed = distil(submit, students="exit 3")
    assert status == 3
    assert "told to stop" not in printed


def test_students_do_not_start_where_no_teacher_comes(submit):
    status, printed = distil(submit, teachers="exit 2", students="echo the students start")
    assert status == 1
    assert "the students start" not in printed
