import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.errors import DataError
from tests.support.chats import chat, random_chats, write_lines, write_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_chat.py"


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command over 30 chats."""
    write_tokenizer(tmp_path / "tokenizer")
    chats = [{"messages": messages} for messages in random_chats(30, 0)]
    write_lines(tmp_path / "chats.jsonl", chats)
    given = {
        "--input": tmp_path / "chats.jsonl",
        "--output-prefix": tmp_path / "x",
        "--tokenizer-model": tmp_path / "tokenizer",
        "--pack-length": 2048,
    }
    flags = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, str(TOOL), *flags]


def test_it_says_what_came_out_and_what_was_left_out(words: list[str], tmp_path: Path) -> None:
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write("\n")
    stopped = run(words)
    assert (stopped.returncode, stopped.stdout) == (DataError.exit_code, "")
    assert stopped.stderr.startswith(f"{tmp_path}/chats.jsonl:31: blank line")
    assert len(stopped.stderr.splitlines()) == 1
    done = run([*words, "--on-error", "skip"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/x_chat_document: 30 chats in ")
    assert rest[0].startswith("  rejected: 1 x blank line")
    assert rest[1] == f"  they are in {tmp_path}/x.rejected.jsonl"
    assert open_corpus(f"{tmp_path}/x_chat_document").lengths.size == 30


def test_it_imports_neither_torch_nor_the_engine(words: list[str]) -> None:
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    start = f"import sys; sys.argv[:] = sys.argv[1:]\n{program}"
    done = run([sys.executable, "-c", start, *words[1:]])
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(
    words: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    many = [{"messages": chat("q", "a " * 2000)}] * 20_000
    write_lines(tmp_path / "chats.jsonl", many)
    before = {path.name for path in tmp_path.iterdir()}
    process = subprocess.Popen([*words, "--workers", "2"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*.partial")):
        assert process.poll() is None, "the run ended before the signal"
        assert time.monotonic() < deadline, "the run never wrote"
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=300) == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == before
