import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.index import open_corpus
from tests.support.corpora import contents, names, write_corpus

TOOL = Path(__file__).parents[2] / "tools" / "merge_data.py"


def words(*more: str) -> list[str]:
    return [sys.executable, str(TOOL), *more]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two corpora in the folder `in`: 4,000 bytes of tokens with 240 kB of index, and a little."""
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a", [0] * 10_000 + [2000], [1] * 10_001)
    write_corpus(tmp_path / "in" / "b", [3], [1])
    return tmp_path


def test_it_merges_a_folder_and_says_what_came_out(folder: Path) -> None:
    done = run(words("--input", f"{folder}/in", "--output-prefix", f"{folder}/out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/out: 10,002 documents, 2,003 tokens (uint16) of 2 corpora\n"
    assert done.stderr == ""
    assert open_corpus(f"{folder}/out").num_tokens == 2003


def test_it_merges_corpora_in_the_order_given(folder: Path) -> None:
    given = [f"{folder}/in/b", f"{folder}/in/a"]
    done = run(words("--input", *given, "--output-prefix", f"{folder}/out"))
    assert done.returncode == 0, done.stderr
    assert open_corpus(f"{folder}/out").lengths[0] == 3


def test_it_imports_neither_torch_nor_the_engine(folder: Path) -> None:
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    start = f"import sys; sys.argv[:] = sys.argv[1:]\n{program}"
    given = ["--input", f"{folder}/in", "--output-prefix", f"{folder}/out"]
    done = run([sys.executable, "-c", start, str(TOOL), *given])
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_wrong_input_ends_it_with_one_line_and_code_2(folder: Path) -> None:
    (folder / "in" / "a.idx").unlink()
    done = run(words("--input", f"{folder}/in", "--output-prefix", f"{folder}/out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "in/a.idx is not there" in done.stderr
    assert names(folder) == ["in"]


def test_an_output_that_is_there_is_replaced_on_demand_alone(folder: Path) -> None:
    given = ["--input", f"{folder}/in", "--output-prefix", f"{folder}/out"]
    write_corpus(folder / "out", [1], [1])
    before = contents(folder / "out")
    done = run(words(*given))
    assert done.returncode == 2
    assert "say --overwrite" in done.stderr
    assert contents(folder / "out") == before
    assert run(words(*given, "--overwrite")).returncode == 0
    assert open_corpus(f"{folder}/out").num_tokens == 2003


@pytest.mark.parametrize(("limit_bytes", "kind"), [(1_000, "idx"), (500_000, "bin")])
def test_a_disk_without_room_ends_it_with_code_2_and_nothing_is_left(
    limit_bytes: int, kind: str, folder: Path
) -> None:
    # The index of both is 200 kB; the tokens, written after it, are made larger than that.
    write_corpus(folder / "in" / "c", [1_000_000], [1])

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(
        words("--input", f"{folder}/in", "--output-prefix", f"{folder}/out"),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limit_files,
    )
    assert done.returncode == 2
    assert f"out.{kind}.partial: File too large" in done.stderr
    assert names(folder) == ["in"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three corpora that take a while to merge: 40 MB of index each."""
    folder = tmp_path_factory.mktemp("large")
    write_corpus(folder / "a", [0] * 2_000_000 + [1], [1] * 2_000_001)
    for name in "bc":
        for kind in ("bin", "idx"):
            (folder / f"{name}.{kind}").hardlink_to(folder / f"a.{kind}")
    return [f"{folder}/{name}" for name in "abc"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(
    number: signal.Signals, large: list[str], tmp_path: Path
) -> None:
    command = words("--input", *large, "--output-prefix", f"{tmp_path}/out")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "out.idx.partial").exists():
            assert time.monotonic() < deadline, "it did not begin"
            time.sleep(0.001)
        process.send_signal(number)
        assert process.wait(timeout=300) == 128 + number
    assert names(tmp_path) == []


def test_token_types_that_differ_are_told_with_what_to_do(folder: Path) -> None:
    write_corpus(folder / "in" / "c", [3], [1], np.dtype("<i4").str)
    done = run(words("--input", f"{folder}/in", "--output-prefix", f"{folder}/out"))
    assert done.returncode == 2
    assert "in/c holds int32" in done.stderr
    assert "tools/preprocess_data.py and the same tokenizer" in done.stderr
