"""The program's words; that replicas serve is in tests/teacher/test_supervisor.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlr1.teacher.pool import Lease, LeaseKeeper
from tests.support.teachers import TableTeacher, make_keys, serving

TOOL = Path(__file__).parents[2] / "tools" / "serve_teacher.py"


def run(*words):
    command = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])


def test_it_plans_before_anything_is_bought():
    planned = run("--plan", "950m", "--student-gpus", 128)
    assert planned.returncode == 0, planned.stderr
    assert "replicas, no wait   195" in planned.stdout
    assert "3.93 Gbit/s" in planned.stdout


def test_it_shows_the_pools_replicas(tmp_path):
    keys, _ = make_keys(tmp_path / "keys")
    with serving(TableTeacher(), keys=keys, pool=tmp_path / "pool", name="one") as replica:
        LeaseKeeper(tmp_path / "pool", Lease(name="one", endpoint=replica.endpoint)).keep()
        words = ("--status", "--once", "--pool", tmp_path / "pool", "--keys", tmp_path / "keys")
        shown = run(*words, "--student", "student")
    assert shown.returncode == 0, shown.stderr
    assert "1 of 1 replicas answer" in shown.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--model is missing"),
        (("--model", "x"), "--bind is missing"),
        (("--model", "x", "--bind", "tcp://*:5555"), "every interface"),
        (("--model", "x", "--bind", "tcp://127.0.0.1:5555"), "without keys"),
        (("--model", "x", "--bind", "tcp://lo:1", "--devices", "gpu"), "--devices"),
        (("--model", "x", "--bind", "tcp://lo:1", "--keys", "missing"), "cannot be read"),
        (("--status",), "give --pool"),
        (("--status", "--pool", "missing"), "no folder"),
        (("--status", "--pool", "tcp://h:1", "--keys", "k"), "belong together"),
        (("--plan", "7b"), "7b"),
        (("--plan", "950m", "--form", "top_k"), "top_k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_words_end_with_one_message(words, says):
    refused = run(*words)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
