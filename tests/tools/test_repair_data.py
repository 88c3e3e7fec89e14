import os
import subprocess
import sys
from pathlib import Path

from tests.support.corpora import names, write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "repair_data.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_mends_into_a_new_corpus_and_says_what_was_left_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2, 3, 4], [1, 1, 1])
    os.truncate(tmp_path / "a.bin", 11)
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/out")
    done = run(*given)
    assert (done.returncode, done.stdout) == (2, "")
    assert "With --truncate" in done.stderr
    done = run(*given, "--truncate")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path}/out: 2 documents, 5 tokens (uint16); 1 documents left out\n"
    )
    assert run(*given, "--truncate").returncode == 2
    assert run(*given, "--truncate", "--overwrite").returncode == 0


def test_lost_borders_of_documents_need_a_flag(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2, 3, 4], [1, 1, 1])
    os.truncate(tmp_path / "a.idx", (tmp_path / "a.idx").stat().st_size - 3)
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/out")
    assert "--sequences-as-documents" in run(*given).stderr
    assert run(*given, "--sequences-as-documents").returncode == 0


def test_a_sound_corpus_needs_no_repair(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2], [1])
    done = run("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/out")
    assert done.returncode == 2
    assert "has no fault" in done.stderr
    assert names(tmp_path) == ["a.bin", "a.idx"]
