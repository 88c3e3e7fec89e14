"""The program's words; that replicas serve is in tests/teacher/test_supervisor.py."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.teachers import TableTeacher, make_keys, make_teacher_folder, serving

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
    pool = tmp_path / "pool"
    with serving(TableTeacher(), keys=keys, pool=pool, name="one"):
        deadline = time.monotonic() + 60
        while not list(pool.glob("one*.lease*")):
            assert time.monotonic() < deadline, "the replica never came to the pool"
            time.sleep(0.02)
        words = ("--status", "--once", "--pool", pool, "--keys", tmp_path / "keys")
        shown = run(*words, "--student", "student")
    assert shown.returncode == 0, shown.stderr
    assert "1 of 1 replicas answer" in shown.stdout


def test_a_pool_in_which_nobody_answers_has_an_exit_status_of_its_own(tmp_path):
    shown = run("--status", "--once", "--pool", tmp_path)
    assert shown.returncode == 75
    assert "0 of 0 replicas answer" in shown.stdout
    assert shown.stderr.startswith(f"No replica of {tmp_path} answers; ")
    assert "Traceback" not in shown.stderr


def test_a_teacher_that_fp8_changes_too_much_ends_with_its_figures(tmp_path):
    folder = make_teacher_folder(tmp_path / "teacher")
    words = ("--bind", "tcp://127.0.0.1:*", "--insecure-loopback", "--pool", tmp_path / "pool")
    refused = run("--model", folder, *words, "--precision", "fp8", "--fp8-max-kl", 1e-12)
    assert refused.returncode == 2
    assert "nats a token and keeps the likeliest id of" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("pool/*")), "it never came to the pool"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--model is missing"),
        (("--model", "x"), "--bind is missing"),
        (("--model", "x", "--bind", "tcp://*:5555"), "every interface"),
        (("--model", "x", "--bind", "tcp://127.0.0.1:5555"), "without keys"),
        (("--model", "x", "--bind", "tcp://lo:1", "--devices", "gpu"), "--devices"),
        (("--model", "x", "--bind", "tcp://lo:1", "--keys", "missing"), "cannot be read"),
        (("--model", "x", "--bind", "tcp://lo:1", "--fp8-max-kl", "1"), "--precision fp8 is not"),
        (
            ("--model", "x", "--bind", "tcp://lo:1", "--precision", "fp8", "--fp8-max-kl", "0"),
            "above",
        ),
        (("--status",), "give --pool"),
        (("--status", "--pool", "missing"), "no folder"),
        (("--status", "--pool", "tcp://h:1", "--keys", "k"), "belong together"),
        (("--model", "x", "--bind", "tcp://lo:1", "--pool", "tcp://h:1"), "Name a folder"),
        (
            ("--model", "x", "--bind", "tcp://lo:1", "--insecure-loopback", "--held-gb", "nan"),
            "finite",
        ),
        (("--plan", "7b"), "7b"),
        (("--plan", "950m", "--teacher-tokens-per-s", "inf"), "finite"),
        (("--plan", "950m", "--form", "top_k"), "top_k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_words_end_with_one_message(words, says):
    refused = run(*words)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
