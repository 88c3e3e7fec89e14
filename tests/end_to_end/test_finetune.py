"""Fine-tuning on packed chats: what a step learns does not depend on how the chats are laid out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mlr1.data.chat_corpus import ChatPlan, ChatSummary, make_packs
from megatron_mlr1.data.chat_encode import ChatEncoding
from tests.end_to_end.conftest import Train, checkpoint_of, exact, record
from tests.support.chats import random_chats, write_lines, write_tokenizer

STEPS, SAVED = 6, 3
CORPUS = "tulu_3"
"""The only corpus of the mixture of general fine-tuning."""


def pack_chats(root: Path, number: int, pack_length: int) -> ChatSummary:
    """Make the corpus of the first `number` chats."""
    chats = random_chats(100, seed=0, longest=120)[:number]
    lines = write_lines(root / "chats.jsonl", [{"messages": messages} for messages in chats])
    return make_packs(
        ChatPlan(
            inputs=(str(lines),),
            output_prefix=str(root / CORPUS),
            encoding=ChatEncoding(
                tokenizer_model=str(root / "tokenizer"),
                train_on="assistant",
                pack_length=pack_length,
            ),
            workers=1,
            seed=pack_length,
            overwrite=True,
        )
    )


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ChatSummary]:
    """Chats in a number of packs that four micro-batches share evenly."""
    root = tmp_path_factory.mktemp("packs")
    write_tokenizer(root / "tokenizer")
    for number in range(40, 100):
        summary = pack_chats(root, number, 512)
        if summary.packs % 4 == 0:
            return root, summary
    raise AssertionError("some number of chats makes a multiple of four packs")


Finetune = Callable[..., dict[int, tuple[float, float]]]


@pytest.fixture(scope="module")
def finetune(train: Train) -> Finetune:
    """Train on all chats in every step; give the loss and the gradient's norm of each."""

    def run(
        save: Path,
        root: Path,
        packed: ChatSummary,
        micro_batch: int,
        *words: str,
        processes: int = 1,
    ) -> dict[int, tuple[float, float]]:
        flags = ["--data-root", str(root), "--mixture", "sft_general", "--split", "100,0,0"]
        flags += ["--seq-length", str(packed.pack_length), "--max-position-embeddings", "2048"]
        flags += ["--global-batch-size", str(packed.packs), "--micro-batch-size", str(micro_batch)]
        flags += ["--train-iters", str(STEPS), "--lr-warmup-iters", "1", "--lr", "1e-3"]
        done = train(save, *flags, *words, processes=processes, stage="sft_general")
        assert done.code == 0, done.output[-3000:]
        return {step: (row["lm loss"], row["grad_norm"]) for step, row in record(save).items()}

    return run


@pytest.fixture(scope="module")
def weights(
    train: Train, packs: tuple[Path, ChatSummary], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of the stage before: all runs here start from the same weights."""
    save = tmp_path_factory.mktemp("weights") / "save"
    flags = ["--data-root", str(packs[0]), "--mixture", "sft_general", "--seq-length", "512"]
    flags += ["--train-iters", "1", "--lr-warmup-iters", "0"]
    done = train(save, *flags, stage="pretrain_phase1")
    assert done.code == 0, done.output[-3000:]
    return save


@pytest.fixture(scope="module")
def once(
    finetune: Finetune,
    packs: tuple[Path, ChatSummary],
    weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """One process, every step in one micro-batch, a checkpoint in the middle."""
    save = tmp_path_factory.mktemp("once") / "save"
    root, packed = packs
    words = ["--load", str(weights), "--save-interval", str(SAVED)]
    finetune(save, root, packed, packed.packs, *words)
    return save


def figures(save: Path) -> dict[int, tuple[float, float]]:
    return {step: (row["lm loss"], row["grad_norm"]) for step, row in record(save).items()}


def test_the_model_learns_from_packs(once: Path) -> None:
    losses = [loss for loss, _ in figures(once).values()]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_a_resumed_run_repeats_every_step_exactly(
    once: Path, finetune: Finetune, packs: tuple[Path, ChatSummary], tmp_path: Path
) -> None:
    again = checkpoint_of(once, SAVED, tmp_path / "again")
    finetune(again, *packs, packs[1].packs)
    steps = exact(again)
    assert set(steps) == set(range(SAVED + 1, STEPS + 1))
    assert steps == {step: exact(once)[step] for step in steps}


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 4), (2, 2)])
def test_ranks_and_micro_batches_do_not_change_a_step(
    once: Path,
    weights: Path,
    finetune: Finetune,
    packs: tuple[Path, ChatSummary],
    tmp_path: Path,
    processes: int,
    micro_batches: int,
) -> None:
    root, packed = packs
    micro_batch = packed.packs // (processes * micro_batches)
    steps = finetune(
        tmp_path / "save", root, packed, micro_batch, "--load", str(weights), processes=processes
    )
    for step, want in figures(once).items():
        assert steps[step] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_neighbours_in_a_pack_do_not_change_what_is_learned(
    once: Path,
    weights: Path,
    finetune: Finetune,
    packs: tuple[Path, ChatSummary],
    tmp_path: Path,
) -> None:
    root, packed = packs
    shutil.copytree(root / "tokenizer", tmp_path / "tokenizer")
    other = pack_chats(tmp_path, packed.chats, 1024)
    assert other.packs < packed.packs
    assert (other.chats, other.trained_tokens) == (packed.chats, packed.trained_tokens)
    steps = finetune(tmp_path / "save", tmp_path, other, 1, "--load", str(weights))
    for step, want in figures(once).items():
        assert steps[step] == pytest.approx(want, rel=1e-5)
