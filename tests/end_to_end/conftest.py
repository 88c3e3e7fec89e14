"""Corpora, and the product's own command under torchrun, for runs of a few steps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[2]
LAST, FIRST = 25, 5
"""Runs last 25 steps; those that are compared start from the checkpoint of step 5."""


@dataclass(frozen=True)
class Corpora:
    root: Path
    mixture: Path


@dataclass(frozen=True)
class Finished:
    code: int
    output: str


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Two corpora of this package's own files, tokenized by the product's tool."""
    root = tmp_path_factory.mktemp("corpora")
    texts = {
        "code": [path.read_text() for path in sorted((ROOT / "megatron_mlr1").rglob("*.py"))],
        "tests": [path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))],
    }
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts["code"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.save_pretrained(root / "tokenizer")
    for name, documents in texts.items():
        lines = root / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        words = ["--input", lines, "--output-prefix", root / name, "--workers", "1"]
        words += ["--tokenizer-type", "HuggingFaceTokenizer", "--append-eod"]
        words += ["--tokenizer-model", root / "tokenizer"]
        subprocess.run(
            [sys.executable, ROOT / "tools" / "preprocess_data.py", *map(str, words)],
            check=True,
            capture_output=True,
        )
    mixture = root / "mixture.yaml"
    mixture.write_text(
        "about: this package\n"
        "corpora:\n"
        "  code: {weight: 0.7, dataset: its sources}\n"
        "  tests: {weight: 0.3, dataset: its tests}\n"
    )
    return Corpora(root=root, mixture=mixture)


Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def train(corpora: Corpora) -> Train:
    """Run `megatron_mlr1.train`, disturbed at a step if asked.

    By torchrun where a signal or a GPU is part of it; else by processes that start in moments.
    """

    def run(
        save: Path,
        *more: str,
        processes: int = 1,
        stage: str = "pretrain_phase1",
        length: Sequence[str] = ("--train-iters", str(LAST), "--lr-warmup-iters", "4"),
        signal_at: tuple[int, signal.Signals] | None = None,
        at_step: tuple[int, Callable[["subprocess.Popen[bytes] | Ranks"], object]] | None = None,
        gpu: bool = False,
    ) -> Finished:
        words = ["--model", "tiny", "--stage", stage, "--data-root", str(corpora.root)]
        words += ["--mixture", str(corpora.mixture), "--save", str(save), "--seq-length", "64"]
        words += [*length, "--eval-iters", "0"]
        words += ["--log-interval", "5", "--use-distributed-optimizer", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if not gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = save.with_suffix(".log")
        process: subprocess.Popen[bytes] | Ranks
        if gpu or signal_at is not None:
            process = torchrun(words, log, environment, processes)
            if signal_at is not None:
                interrupt(process, save, *signal_at)
        else:
            process = Ranks(words, log, environment, processes)
        if at_step is not None:
            wait_for(process, save, at_step[0])
            at_step[1](process)
        code = process.wait(timeout=900)
        return Finished(code=code, output=log.read_text())

    return run


def torchrun(
    words: list[str], log: Path, environment: dict[str, str], processes: int
) -> "subprocess.Popen[bytes]":
    """Start what the documents tell a person to start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Where the name of the host cannot be resolved.
    command += ["--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), "-m", "megatron_mlr1.train", *words]
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(process: "subprocess.Popen[bytes] | Ranks", save: Path, step: int) -> None:
    """Wait until the record shows a step."""
    deadline = time.monotonic() + 600
    while not any(row["iteration"] >= step for row in record(save).values()):
        assert process.poll() is None, "the run ended before the step"
        assert time.monotonic() < deadline, "the run never came to the step"
        time.sleep(0.02)


def interrupt(process: "subprocess.Popen[bytes]", save: Path, step: int, which: int) -> None:
    """Send a signal as soon as the record shows a step."""
    wait_for(process, save, step)
    if which == signal.SIGKILL:
        # Nothing may be left that could still save: torchrun, its workers and their helpers.
        for child in descendants(process.pid):
            with suppress(ProcessLookupError):  # a helper that has just ended
                os.kill(child, which)
    process.send_signal(which)


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def record(save: Path) -> dict[int, dict[str, Any]]:
    """Read the record of a run, step by step; the last word on a step counts."""
    path = save / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text().split("\n")[:-1]
    return {row["iteration"]: row for row in map(json.loads, lines)}


def exact(save: Path) -> dict[int, tuple[float, float, float, int]]:
    """The figures of each step that a resumed run must repeat to the last bit."""
    return {
        step: (row["lm loss"], row["grad_norm"], row["learning_rate"], row["consumed_samples"])
        for step, row in record(save).items()
    }


@pytest.fixture(scope="session")
def single(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never interrupted, with a checkpoint every five steps."""
    save = tmp_path_factory.mktemp("single") / "save"
    done = train(save, "--save-interval", "5")
    assert done.code == 0, done.output[-3000:]
    return save


@pytest.fixture
def from_step_five(single: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a folder that a run goes on from at step 5 of the single process."""

    def make(name: str) -> Path:
        return checkpoint_of(single, FIRST, tmp_path / name)

    return make


def checkpoint_of(save: Path, step: int, copy: Path) -> Path:
    """Copy one checkpoint into a folder of its own, with the run's record."""
    copy.mkdir()
    shutil.copytree(save / f"iter_{step:07d}", copy / f"iter_{step:07d}")
    shutil.copy(save / "run.json", copy)
    (copy / "latest_checkpointed_iteration.txt").write_text(str(step))
    return copy
