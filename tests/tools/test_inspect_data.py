import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.corpora import write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "big", [40, 3, 17], [1, 1, 1])
    return tmp_path / "big"


def test_it_says_what_a_corpus_holds(corpus: Path) -> None:
    done = run(str(corpus), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["num_documents"], found["num_tokens"], found["dtype"]) == (3, 60, "uint16")
    assert sum(part["num_documents"] for part in found["histogram"]) == 3
    assert "60" in run(str(corpus)).stdout


def test_a_benchmark_in_a_corpus_is_reported_with_its_document(
    corpus: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.jsonl"
    done = run(str(corpus), "--against", str(corpus), "--report", str(report))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {0, 1, 2} <= {row["document"] for row in rows if "document" in row}


def test_nothing_of_another_corpus_is_found(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", [50, 20], [1, 1])
    report = tmp_path / "report.jsonl"
    done = run(str(corpus), "--against", str(tmp_path / "other"), "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert "0 documents" in done.stdout


def test_the_picture_is_a_picture(corpus: Path, tmp_path: Path) -> None:
    done = run(str(corpus), "--picture", str(tmp_path / "lengths.png"))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "lengths.png") as picture:
        picture.verify()
        assert picture.width > 300


def test_a_missing_corpus_is_one_line_and_code_2_and_leaves_nothing(tmp_path: Path) -> None:
    done = run(str(tmp_path / "none"), "--picture", str(tmp_path / "lengths.png"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_read_is_not_written_over(corpus: Path, tmp_path: Path) -> None:
    before = Path(f"{corpus}.bin").read_bytes()
    done = run(str(corpus), "--against", str(corpus), "--report", f"{corpus}.bin")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--report is" in done.stderr
    assert "which is read as a corpus" in done.stderr
    assert Path(f"{corpus}.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.bin", "big.idx"]


def test_a_folder_stands_for_its_corpora(corpus: Path) -> None:
    assert run(str(corpus.parent)).stdout == run(str(corpus)).stdout
