import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mlr1.teacher.keys import read_pool_keys, read_student_keys

TOOL = Path(__file__).parents[2] / "tools" / "teacher_keys.py"


def run(*words):
    command = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])


def test_it_makes_keys_that_pool_and_student_can_read(tmp_path):
    made = run(tmp_path / "keys", "--pool", "--student", "run1")
    assert made.returncode == 0, made.stderr
    read_pool_keys(tmp_path / "keys")
    keys = read_student_keys(tmp_path / "keys", "run1")
    for secret in (tmp_path / "keys").rglob("*.key_secret"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert keys.pair.secret.decode() not in made.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [((), "--student"), (("--student", "../x"), "no key"), (("--pool",), "already")],
)
def test_wrong_words_end_with_one_message(tmp_path, words, says):
    run(tmp_path, "--pool")
    refused = run(tmp_path, *words)
    assert refused.returncode == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
