"""Where a run starts: its own last checkpoint, the weights of a former stage, or nothing.

The engine would start from random weights when a folder to load holds no checkpoint, and would
carry one stage's schedule into the next. Both are decided here instead.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import CheckpointingException

from megatron_mlr1 import cpu
from megatron_mlr1.checkpoint.folder import replace_text
from megatron_mlr1.errors import CheckpointError, ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
"""The engine's file that names the newest whole checkpoint of a folder."""

_UNREADABLE = (
    *(CheckpointingException, pickle.UnpicklingError, EOFError),
    *(OSError, RuntimeError, ValueError, AssertionError),
)
"""How a damaged checkpoint shows when it is read."""

RUN = "run.json"
"""Our record beside the checkpoints: which run wrote them, and with which words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a folder of checkpoints belongs to."""

    model: str
    stage: str
    dataset: str
    """Whose datasets gave the samples their order: one of `options.DATASETS`."""

    words: tuple[str, ...]
    """The words that the engine got."""

    versions: dict[str, str]
    """Of Python, torch, Megatron-Core and this package."""

    teacher: str = ""
    """Fingerprint of the teacher that the run learned from; "" where it has had none."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the record of a folder; None where there is none.

        Raises:
            CheckpointError: the record cannot be read.
        """
        path = folder / RUN
        if not path.exists():
            return None
        try:
            fields = json.loads(path.read_text())
            # Before there was a choice, all runs read by Megatron's datasets.
            return cls(**{"dataset": "megatron", **fields, "words": tuple(fields["words"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); it is the record that training writes beside "
                "its checkpoints. Move it away to go on without it."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the record, whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(folder / RUN, json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"--save {folder} cannot be written ({error.strerror}); checkpoints go there. Give "
                "a folder that every node can write."
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How a run starts, in the engine's words and for a person."""

    words: tuple[str, ...]
    reason: str


def decide(
    *,
    run: Run,
    save: Path | None,
    load: Path | None,
    from_scratch: bool,
    needs_load: str | None,
    new_data_order: bool,
) -> Start:
    """Decide where a run starts.

    Args:
        run: the run that is about to start.
        save: folder of its checkpoints.
        load: folder that the user names to start from.
        from_scratch: the user wants random weights even for a later stage.
        needs_load: the stage whose weights this one starts from.
        new_data_order: the user wants another dataset's order from the checkpoint on.

    Raises:
        ConfigError: a later stage without weights to start from, a folder of another run, or one
            whose samples came in another order.
        CheckpointError: nothing to load where the user says.
    """
    if save is not None and has_checkpoint(save):
        _refuse_other_run(run, save)
        _refuse_release(save)
        _refuse_other_order(run, save, new_data_order=new_data_order)
        _refuse_other_rate(run, save)
        return _go_on(save, f"goes on from its last checkpoint in {save}")
    if load is not None and load != save:
        return _from(load, run, new_data_order=new_data_order)
    if needs_load is not None and not from_scratch:
        raise ConfigError(
            f"Stage {run.stage} starts from the weights of {needs_load}, and --load is missing. "
            f"Give --load with the folder that {needs_load} saved to, or --from-scratch for random "
            "weights."
        )
    return Start(words=(), reason="starts from random weights")


def former_teacher(model: str, stage: str, save: Path | None, load: Path | None) -> str:
    """Give the teacher that a run learned from before it goes on; "" where there was none.

    Args:
        model: of the run.
        stage: of the run; another stage's teacher does not bind this one.
        save: folder of its checkpoints.
        load: folder that the user names to start from.

    Raises:
        CheckpointError: a record cannot be read.
    """
    for folder in (save, load):
        if folder is not None and has_checkpoint(folder):
            run = Run.read(folder)
            same = run is not None and (run.model, run.stage) == (model, stage)
            return run.teacher if run is not None and same else ""
    return ""


def remember_teacher(folder: Path, fingerprint: str) -> None:
    """Write into a folder's record from which teacher its run learns.

    Raises:
        CheckpointError: the record cannot be read or written.
    """
    run = Run.read(folder)
    assert run is not None, "a run writes its record before it opens its teacher"
    replace(run, teacher=fingerprint).write(folder)


def has_checkpoint(folder: Path) -> bool:
    """Tell whether the engine finds a whole checkpoint in a folder."""
    return (folder / TRACKER).is_file()


def _go_on(folder: Path, reason: str) -> Start:
    """Load all that a folder holds, but random numbers that do not fit the device.

    A CPU's generator has 5,056 bytes and a GPU's 16: the engine would end with a stack trace when
    it hands one the other's.
    """
    words = ("--load", str(folder))
    if _was_in_cpu_mode(folder) in (None, cpu.is_active()):
        return Start(words=words, reason=reason)
    there, here = ("a GPU", "a CPU") if cpu.is_active() else ("a CPU", "a GPU")
    return Start(
        words=(*words, "--no-load-rng"),
        reason=f"{reason}, which {there} wrote; random numbers start anew on {here}",
    )


def _was_in_cpu_mode(folder: Path) -> bool | None:
    """Tell whether CPU mode wrote the newest checkpoint; None where it cannot be read.

    Then the engine, which reads it next, says what is wrong with it.
    """
    iteration = (folder / TRACKER).read_text().strip()
    if not iteration.isdecimal():
        return None
    try:
        common = load_common_state_dict(folder / f"iter_{int(iteration):07d}")
    except _UNREADABLE:
        return None
    # CPU mode is over gloo always, see `cpu.FLAGS`.
    backend = getattr(common.get("args"), "distributed_backend", None)
    return None if backend is None else backend == "gloo"


def _from(load: Path, run: Run, *, new_data_order: bool) -> Start:
    if not has_checkpoint(load):
        raise CheckpointError(
            f"--load {load} holds no checkpoint ({TRACKER} is missing). Give the folder that a run "
            "saved to or that tools/convert_checkpoint.py hf-to-megatron wrote."
        )
    other = Run.read(load)
    if other is not None and (other.model, other.stage) == (run.model, run.stage):
        _refuse_other_order(run, load, new_data_order=new_data_order)
        _refuse_other_rate(run, load)
        return _go_on(load, f"goes on from {load}, the same stage's run")
    if other is not None and other.model != run.model:
        raise ConfigError(
            f"--load {load} holds a {other.model} and this run trains a {run.model}; the weights "
            "do not fit. Give a checkpoint of the same model."
        )
    what = "weights" if other is None else f"weights of {other.stage}"
    return Start(
        words=("--pretrained-checkpoint", str(load)),
        reason=f"starts from the {what} in {load}, with a new optimizer and its own schedule",
    )


def _refuse_other_run(run: Run, save: Path) -> None:
    other = Run.read(save)
    if other is not None and (other.model, other.stage) != (run.model, run.stage):
        raise ConfigError(
            f"--save {save} holds checkpoints of {other.model} {other.stage}, and this run is "
            f"{run.model} {run.stage}. Give each stage a folder of its own; to start from those "
            "weights name that folder with --load."
        )


def _refuse_other_order(run: Run, folder: Path, *, new_data_order: bool) -> None:
    """Keep a run's samples in one order: in another, some come twice and others never."""
    other = Run.read(folder)
    if other is not None and other.dataset != run.dataset and not new_data_order:
        raise ConfigError(
            f"{folder} is of a run that read its data by --mlr1-dataset {other.dataset}, and this "
            f"one reads by {run.dataset}: another order, in which samples that were seen come "
            f"again. Give --mlr1-dataset {other.dataset} to go on in the old order, or "
            "--new-data-order to take the new one from here on."
        )
    if other is not None and not new_data_order:
        was, now = _both(other, run, "--seq-length")
        if was != now:
            raise ConfigError(
                f"{folder} is of a run of --seq-length {was}, and this one has {now}: other "
                f"samples, in which tokens that were seen come again. Give --seq-length {was} to "
                "go on, or --new-data-order to take the new length from here on."
            )


def _refuse_other_rate(run: Run, folder: Path) -> None:
    """Keep what the engine finds the optimizer's state by; with another it ends in a KeyError."""
    other = Run.read(folder)
    if other is None or "--no-load-optim" in run.words:
        return
    for flag in ("--lr", "--min-lr"):
        was, now = _both(other, run, flag)
        if was is not None and now is not None and float(was) != float(now):
            raise ConfigError(
                f"{folder} is of a run of {flag} {was}, and this one has {now}, for which the "
                f"engine finds no state of the optimizer there. Give {flag} {was} to go on, or "
                "--no-load-optim to go on from these weights with a new optimizer."
            )


def _both(other: Run, run: Run, flag: str) -> tuple[str | None, str | None]:
    """Give a flag's value in both runs; None twice where one of them does not say."""
    was, now = (without(words, flag)[1] for words in (other.words, run.words))
    return (None, None) if was is None or now is None else (was, now)


def _refuse_release(save: Path) -> None:
    """Keep converted weights apart from a run's checkpoints: the engine counts steps by name."""
    if (save / TRACKER).read_text().strip() == "release":
        raise ConfigError(
            f"--save {save} holds converted weights and no steps of a run. Name it with --load, "
            "and give --save a folder of its own."
        )


def without(words: Sequence[str], flag: str) -> tuple[tuple[str, ...], str | None]:
    """Take a flag with one value out of a list of words; give the rest and the last value."""
    rest: list[str] = []
    value: str | None = None
    waiting = iter(words)
    for word in waiting:
        if word == flag:
            value = next(waiting, None)
        elif word.startswith(flag + "="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
    return tuple(rest), value
