import hashlib
import subprocess
import sys
from pathlib import Path

from tests.support.corpora import patch, place, write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "check_data.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_says_what_sound_corpora_hold(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2, 3], [2])
    write_corpus(tmp_path / "b", [1], [1], "<i4")
    done = run("--input", str(tmp_path), "--checksum", "--vocab-size", "60000")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/a: 1 documents, 2 sequences, 5 tokens (uint16)"
    assert lines[3] == f"{tmp_path}/b: 1 documents, 1 sequences, 1 tokens (int32)"
    for line in lines[1:3] + lines[4:]:
        digest, path = line.split("  ")
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest


def test_the_first_fault_ends_it_with_one_line_and_code_2(tmp_path: Path) -> None:
    for name in "abc":
        write_corpus(tmp_path / name, [2, 3], [2])
    for name in "bc":
        patch(tmp_path / f"{name}.idx", place("begin", 1, 2), "q", 6)
    done = run("--input", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout.startswith(f"{tmp_path}/a: 1 documents")
    assert done.stderr.count("\n") == 1
    assert "b.idx begins sequence 1 at byte 6 where the lengths make 4" in done.stderr


def test_an_id_outside_the_vocabulary_ends_it_with_code_2(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [500], [1])
    done = run("--input", f"{tmp_path}/a", "--vocab-size", "10")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ids must be 0 to 9" in done.stderr
