import json
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.jobs import CorpusSummary
from megatron_mlr1.data.provenance import read_record
from tests.support.corpora import contents

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
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def published(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("c")}


def position(folder: Path) -> object:
    try:
        return json.loads((folder / "c.journal.json").read_text())["position"]
    except FileNotFoundError:
        return None


CORPUS = ["c_text_document.bin", "c_text_document.idx", "c_text_document.meta.json"]


def test_it_makes_a_corpus_and_says_what_it_holds(tmp_path: Path) -> None:
    write_input(tmp_path, 250)
    done = run(words(tmp_path, "--append-eod"))
    assert done.returncode == 0, done.stderr
    assert "c_text_document: 250 documents, 5,250 tokens (uint16), " in done.stdout
    assert done.stderr == ""
    assert open_corpus(f"{tmp_path}/c_text_document").num_tokens == 5250
    assert files(tmp_path) == [*CORPUS, "in.jsonl"]


def test_it_imports_neither_torch_nor_the_engine(tmp_path: Path) -> None:
    write_input(tmp_path, 2)
    program = (
        "import sys; sys.argv[:] = sys.argv[1:]\n"
        "import runpy\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", program, *words(tmp_path)[1:]])
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_wrong_line_ends_it_with_one_line_and_code_2(tmp_path: Path) -> None:
    write_input(tmp_path, 3)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("{'text': 'no JSON'}\n")
    done = run(words(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "in.jsonl:4: not JSON" in done.stderr
    assert files(tmp_path) == ["in.jsonl"]

    done = run(words(tmp_path, "--on-error", "skip"))
    assert done.returncode == 0, done.stderr
    assert "3 documents, 60 tokens (uint16), 1 record rejected" in done.stdout
    [line] = (tmp_path / "c.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{tmp_path}/in.jsonl:4"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split-sentences"], "--split-sentences of Megatron-LM's tool is not known here"),
        (["--partitions=2"], "--partitions of Megatron-LM's tool is not known here"),
        (["--log-interval", "0"], "--log-interval is 0"),
        (["--workers", "0"], "--workers is 0"),
        (["--shard", "2/2"], "2/2 is no shard"),
        (["--only", "a"], "--only makes no sense without --manifest"),
        (["--manifest", "m.yaml"], "makes no sense with --manifest, which says it"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "invalid choice"),
        (["--input", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_words_end_it_with_code_2(more: list[str], message: str, tmp_path: Path) -> None:
    write_input(tmp_path, 1)
    done = run(words(tmp_path, *more))
    assert done.returncode == 2
    assert message in done.stderr
    assert files(tmp_path) == ["in.jsonl"]


def test_a_disk_without_room_ends_it_with_code_2_and_it_goes_on_where_there_is_room(
    tmp_path: Path,
) -> None:
    write_input(tmp_path, 200, 100_000)
    small = words(tmp_path, "--journal-mb", "0.00001")

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000))

    done = subprocess.run(
        small, capture_output=True, text=True, timeout=300, preexec_fn=limit_files
    )
    assert done.returncode == 2
    assert "c_text_document.bin.partial: File too large" in done.stderr
    assert position(tmp_path) is not None
    assert CORPUS[0] not in files(tmp_path)
    assert run(small).returncode == 0
    assert open_corpus(f"{tmp_path}/c_text_document").num_tokens == 20_000_000
    assert files(tmp_path) == [*CORPUS, "in.jsonl"]


def test_a_disk_without_room_at_the_begin_leaves_nothing(tmp_path: Path) -> None:
    write_input(tmp_path, 40, 100_000)

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(
        words(tmp_path), capture_output=True, text=True, timeout=300, preexec_fn=limit_files
    )
    assert done.returncode == 2
    assert "c_text_document.bin.partial: File too large" in done.stderr
    assert files(tmp_path) == ["in.jsonl"]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with 30 MB of input that differs everywhere, and what comes of it in `whole`."""
    chance = random.Random(0)
    with (tmp_path / "in.jsonl").open("w") as file:
        for number in range(1500):
            text = f"{number} {chance.random()} " * chance.randint(1, 2000)
            file.write(json.dumps({"text": text}) + "\n")
            if number % 100 == 50:
                file.write(f"bad {number}\n")
    return tmp_path


def more_of(seed: str | None) -> list[str]:
    own = ["--append-eod", "--on-error", "skip", "--journal-mb", "1"]
    return own if seed is None else [*own, "--shuffle-documents", seed]


def undisturbed(folder: Path, more: list[str]) -> dict[str, bytes]:
    done = run([*words(folder, *more)])
    assert done.returncode == 0, done.stderr
    found = {name: (folder / name).read_bytes() for name in published(folder)}
    for name in found:
        (folder / name).unlink()
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_same_command_goes_on(number: signal.Signals, large: Path) -> None:
    expected = undisturbed(large, more_of(None))
    command = words(large, *more_of(None))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_a_new_position(large, None, process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "The same command goes on from here" in stderr
    assert stderr.count("\n") == 1
    assert CORPUS[0] not in files(large)
    assert run(command).returncode == 0
    assert {name: (large / name).read_bytes() for name in published(large)} == expected


def wait_for_a_new_position(folder: Path, before: object, process: subprocess.Popen[str]) -> object:
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (found := position(folder)) != before:
            return found
        time.sleep(0.002)
    return None


@pytest.mark.parametrize("seed", [None, "11"])
def test_killed_again_and_again_it_ends_with_the_bytes_of_an_undisturbed_run(
    seed: str | None, large: Path
) -> None:
    expected = undisturbed(large, more_of(seed))
    command = words(large, *more_of(seed))
    kills, before = 0, None
    chance = random.Random(1)
    while kills < 3:
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True) as process:
            before = wait_for_a_new_position(large, before, process)
            time.sleep(chance.random() / 5)  # before, within and after what the journal tells
            workers = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        _, alive = psutil.wait_procs(workers, timeout=300)
        assert alive == []
        if not (large / "c.journal.json").exists():
            break  # it was killed after all was done
        kills += 1
        assert set(CORPUS) - set(files(large))
    assert kills >= 1
    finish(large, command)
    assert {name: (large / name).read_bytes() for name in published(large)} == expected


def finish(folder: Path, command: list[str]) -> None:
    if (folder / "c.journal.json").exists():
        done = run(command)
        assert done.returncode == 0, done.stderr


def test_killed_in_the_shuffle_it_begins_the_shuffle_again(large: Path) -> None:
    expected = undisturbed(large, more_of("11"))
    command = words(large, *more_of("11"))
    for half in ("c_text_document.shuffle.partial", "c_text_document.idx.partial"):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 300
            while not (large / half).exists() and process.poll() is None:
                assert time.monotonic() < deadline, f"{half} did not appear"
                time.sleep(0.001)
            process.kill()
        if not (large / "c.journal.json").exists():
            break  # the second half is over in a moment
    finish(large, command)
    assert {name: (large / name).read_bytes() for name in published(large)} == expected


MANIFEST = """\
defaults:
  tokenizer: {type: ByteLevelTokenizer}
  append_eod: true
corpora:
  one: {inputs: in.jsonl}
  two: {inputs: in.jsonl, shuffle: false}
"""


def test_a_manifest_is_made_whole_and_what_is_finished_is_left(tmp_path: Path) -> None:
    write_input(tmp_path, 250)
    (tmp_path / "m.yaml").write_text(MANIFEST)
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(TOOL), "--manifest", f"{tmp_path}/m.yaml"]
    command += ["--output-root", f"{tmp_path}/out"]
    done = run([*command, "--only", "two"])
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == [f"two_{name[2:]}" for name in CORPUS]
    before = contents(tmp_path / "out" / "two_text_document")
    done = run(command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "one_text_document: 250 documents, 5,250 tokens" in lines[0]
    assert lines[1] == "two: finished before, nothing to do"
    assert lines[2].startswith("All 2: 500 documents, 10,500 tokens")
    assert contents(tmp_path / "out" / "two_text_document") == before
    records = [read_record(f"{tmp_path}/out/{name}_text_document") for name in ("one", "two")]
    assert [record and record.shuffled for record in records] == [0, None]
    (tmp_path / "in.jsonl").write_text('{"text": "new"}\n')
    done = run(command)
    assert done.returncode == 2
    assert "say --overwrite" in done.stderr


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_journal_of_no_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    read_words = runpy.run_path(str(TOOL))["read_words"]
    with pytest.raises(SystemExit) as ended:
        read_words(["--input", "a", f"--journal-mb={size}"])
    assert ended.value.code == 2
    assert f"--journal-mb is {size}; it must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "words"), [(1, "1 record rejected"), (2, "2 records rejected")])
def test_rejected_records_are_counted_in_words_that_fit(number: int, words: str) -> None:
    summary = CorpusSummary("c", 3, 30, number, np.dtype("<u2"))
    assert f", {words}, " in runpy.run_path(str(TOOL))["_describe"](summary, 1.0)
