import subprocess
import sys
from pathlib import Path

from megatron_mlr1.data.index import open_corpus
from tests.support.corpora import contents, names, write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "shuffle_data.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_it_writes_a_new_corpus_and_says_what_it_holds(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [3] * 100, [1] * 100)
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/b", "--seed", "4")
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path}/b: 100 documents, 300 tokens (uint16), shuffled with seed 4\n"
    )
    tokens = [open_corpus(f"{tmp_path}/{name}").tokens.reshape(-1, 3).tolist() for name in "ab"]
    assert tokens[0] != tokens[1]
    assert sorted(tokens[0]) == sorted(tokens[1])
    assert names(tmp_path) == ["a.bin", "a.idx", "b.bin", "b.idx"]
    before = contents(tmp_path / "b")
    assert "say --overwrite" in run(*given).stderr
    assert run(*given, "--overwrite").returncode == 0
    assert contents(tmp_path / "b") == before


def test_a_wrong_input_ends_it_with_one_line_and_code_2(tmp_path: Path) -> None:
    given = ("--input", f"{tmp_path}/a", "--output-prefix", f"{tmp_path}/b", "--seed", "4")
    done = run(*given)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "a.bin is not there" in done.stderr
