import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_mlr1.data.index import open_corpus

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


def words(folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(TOOL), "--input", f"{folder}/in.jsonl", "--workers", "2"),
        *("--output-prefix", f"{folder}/c", "--tokenizer-type", "ByteLevelTokenizer", *more),
    ]


def write_input(folder: Path, num_documents: int, num_characters: int = 20) -> None:
    line = json.dumps({"text": "x" * num_characters}) + "\n"
    (folder / "in.jsonl").write_text(line * num_documents)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_it_makes_a_corpus_and_says_what_it_holds(tmp_path: Path) -> None:
    write_input(tmp_path, 250)
    done = run(words(tmp_path, "--append-eod", "--log-interval", "100"))
    assert done.returncode == 0, done.stderr
    assert "c_text_document: 250 documents, 5,250 tokens (uint16), " in done.stdout
    assert done.stderr.startswith("Processed 250 documents")
    assert open_corpus(f"{tmp_path}/c_text_document").num_tokens == 5250


def test_a_wrong_line_ends_it_with_one_line_and_code_2(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("{'text': 'no JSON'}\n")
    done = run(words(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "in.jsonl:4: not JSON" in done.stderr
    assert files(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split-sentences"], "--split-sentences of Megatron-LM's tool is not known here"),
        (["--partitions=2"], "--partitions of Megatron-LM's tool is not known here"),
        (["--log-interval", "0"], "--log-interval is 0"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "invalid choice"),
        (["--input", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_wrong_words_end_it_with_code_2(more: list[str], message: str, tmp_path: Path) -> None:
    write_input(tmp_path, 1)
    done = run(words(tmp_path, *more))
    assert done.returncode == 2
    assert message in done.stderr
    assert files(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("limit_bytes", [20_000, 100_000])
def test_a_disk_without_room_ends_it_with_code_2_and_nothing_is_left(
    limit_bytes: int, tmp_path: Path
) -> None:
    # 20,000 tokens take 40,000 bytes and their index 400,042: the first limit makes a write of the
    # tokens fail, the second one of the index.
    write_input(tmp_path, 20_000, 1)

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    done = subprocess.run(
        words(tmp_path), capture_output=True, text=True, timeout=60, preexec_fn=limit_files
    )
    kind = "bin" if limit_bytes == 20_000 else "idx"
    assert done.returncode == 2
    assert f"c_text_document.{kind}.partial: File too large" in done.stderr
    assert files(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(number: signal.Signals, tmp_path: Path) -> None:
    write_input(tmp_path, 300, 100_000)
    with subprocess.Popen(words(tmp_path), stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "c_text_document.bin.partial")
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
    assert files(tmp_path) == ["in.jsonl"]


def test_killed_it_leaves_no_worker_and_nothing_that_looks_finished(tmp_path: Path) -> None:
    write_input(tmp_path, 300, 100_000)
    with subprocess.Popen(words(tmp_path), stderr=subprocess.DEVNULL) as process:
        partial = tmp_path / "c_text_document.bin.partial"
        wait_for(partial)
        while partial.stat().st_size == 0:
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert len(workers) >= 2
    assert alive == []
    assert files(tmp_path) == ["c_text_document.bin.partial", "in.jsonl"]

    write_input(tmp_path, 1)
    again = run(words(tmp_path))
    assert again.returncode == 2
    assert "bin.partial is there already" in again.stderr
    assert run(words(tmp_path, "--overwrite")).returncode == 0
