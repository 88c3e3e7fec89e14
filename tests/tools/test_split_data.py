import subprocess
import sys
from pathlib import Path

from tests.support.corpora import names, write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "split_data.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_writes_shards_and_says_what_each_holds(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [2, 3, 5], [1, 1, 1])
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/s")
    done = run(*given, "--num-shards", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path}/s_00000_text_document: 2 documents, 5 tokens\n"
        f"{tmp_path}/s_00001_text_document: 1 documents, 5 tokens\n"
    )
    again = run(*given, "--max-tokens", "5")
    assert again.returncode == 2
    assert "say --overwrite" in again.stderr
    assert run(*given, "--max-tokens", "5", "--overwrite").returncode == 0


def test_wrong_words_end_it_with_code_2(tmp_path: Path) -> None:
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/s")
    assert "is required" in run(*given).stderr
    assert "not allowed with" in run(*given, "--num-shards", "2", "--max-tokens", "5").stderr
    done = run(*given, "--num-shards", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a.bin is not there" in done.stderr
    assert names(tmp_path) == []
