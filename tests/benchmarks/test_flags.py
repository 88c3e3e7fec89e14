"""What a benchmark refuses before it measures, and how it says what the machine lacks."""

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.flags import a_count, a_time

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (a_count, ["0", "-1", "x", "1.5", "nan"]),
        (a_time, ["0", "-1", "nan", "inf", "x"]),
    ],
)
def test_a_word_that_cannot_be_meant_ends_the_program_with_code_2(kind, words, capsys):
    parser = ArgumentParser()
    parser.add_argument("--flag", type=kind)
    for word in words:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--flag={word}"])
        assert ended.value.code == 2
        assert "argument --flag" in capsys.readouterr().err


def test_other_words_are_what_they_say():
    assert (a_count("3"), a_time("0.5")) == (3, 0.5)


def test_a_broken_transformer_engine_ends_the_benchmark_of_the_step_in_one_line(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcublas.so.13: not found')\n")
    about = tmp_path / "transformer_engine-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 9.9\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_step"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Transformer Engine 9.9 is installed but does not import (libcublas")
