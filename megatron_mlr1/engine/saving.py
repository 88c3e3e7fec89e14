"""A checkpoint is saved whole or not at all, and what fails in one process ends all of them.

The engine writes into `iter_N` itself and names it in its tracker when it is whole. Three things
are added: what stood there is taken away before, the room is looked at before, and what the disk
answers becomes one error of every process, with nothing half-written left where that can be done.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import megatron.training.training
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mlr1.checkpoint.folder import replace_text
from megatron_mlr1.checkpoint.room import refuse_little_room, remove
from megatron_mlr1.engine.agreement import agreed, decided_by_first
from megatron_mlr1.engine.start import TRACKER
from megatron_mlr1.errors import MachineError

OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")
"""What torch says where its own files are not written whole (`--ckpt-format torch`)."""


class Saving:
    """Stands around the engine's saving of checkpoints."""

    def __init__(self, args: Namespace, num_parameters: int) -> None:
        """Take the engine's validated arguments and the size of the model.

        Raises:
            MachineError: the disk has no room for one checkpoint.
        """
        self._args = args
        self._needed = least_bytes(args, num_parameters)
        self._standing: int | None = None
        """Iteration of the newest whole checkpoint in `--save` that this run loaded or saved."""
        self._held: OSError | None = None
        """What the first process met where only it writes, until all have heard of it."""
        if args.save is not None and not args.skip_train:
            refuse_little_room(Path(args.save), self._needed)

    def install(self) -> None:
        """Take the place of the engine's functions, and call them in the middle."""
        training = megatron.training.training
        training.save_checkpoint = partial(self._save, training.save_checkpoint)
        dist_checkpointing.save = partial(self._write, dist_checkpointing.save)
        # These three are for the first process alone, while the others wait for it.
        FileSystemWriterAsync.finish = self._hold(FileSystemWriterAsync.finish)
        serialization.save_config = self._hold(serialization.save_config)
        serialization.save_integrity_manifest = self._hold(serialization.save_integrity_manifest)

    def _save(
        self, engine_save: Callable[..., None], iteration: int, *arguments: Any, **keywords: Any
    ) -> None:
        """Save one iteration, on all processes.

        Raises:
            MachineError: it could not be written.
        """
        folder = self._folder(non_persistent=keywords.get("non_persistent_ckpt", False))
        if self._standing is None and _is_same(self._args.load, self._args.save):
            self._standing = self._args.iteration or None
        if folder is not None and decided_by_first(lambda: self._stands(folder, iteration)):
            return
        try:
            engine_save(iteration, *arguments, **keywords)
        except (OSError, RuntimeError) as error:  # of this process alone
            if isinstance(error, RuntimeError) and not any(it in str(error) for it in OF_TORCH):
                raise
            raise failed(_checkpoint(folder or Path(self._args.save), iteration), error) from error
        if folder == Path(self._args.save) and not self._args.async_save:
            self._standing = iteration

    def _folder(self, *, non_persistent: bool) -> Path | None:
        """Give the folder that a checkpoint goes to; None where each process has its own."""
        args = self._args
        if not non_persistent:
            return Path(args.save)
        if args.non_persistent_ckpt_type != "global":
            return None
        return Path(args.non_persistent_global_ckpt_dir or Path(args.save) / "non_persistent")

    def _stands(self, folder: Path, iteration: int) -> bool:
        """Tell whether just this state is saved already; else make way for it.

        A checkpoint that is written over is none until it is whole again.

        Raises:
            MachineError: there is no room, or the folder cannot be written.
        """
        newest = newest_iteration(folder)
        if newest == iteration == self._standing and folder == Path(self._args.save):
            said = f"  iteration {iteration} is saved already, and nothing was trained since."
            print(said, flush=True)
            return True
        checkpoint = _checkpoint(folder, iteration)
        is_kept = folder == Path(self._args.save)
        try:
            if newest == iteration:
                # Another state of that iteration: until it is whole, the one before counts.
                _name_as_newest(folder, self._standing if is_kept else None)
            if not remove(checkpoint):
                raise OSError(f"{checkpoint} is there already and cannot be removed")
            refuse_little_room(folder, self._needed)
            # The engine counts a folder of the other kind as a checkpoint, and removes former ones.
            (checkpoint if is_kept else folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise failed(checkpoint, error) from error
        return False

    def _write(self, engine_write: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Write a distributed checkpoint, or begin to; gives what the engine's function gives."""
        checkpoint = Path(arguments[1])
        if not keywords.get("async_sharded_save", False):
            self._finish(checkpoint, [partial(engine_write, *arguments, **keywords)])
            return None
        request = engine_write(*arguments, **keywords)
        request.finalize_fns[:] = [partial(self._finish, checkpoint, list(request.finalize_fns))]
        return request

    def _finish(self, checkpoint: Path, works: Sequence[Callable[[], Any]]) -> None:
        """Do what makes a checkpoint whole, on all processes; or take away what there is of it.

        Raises:
            MachineError: it could not be written.
        """
        error: BaseException | None = None
        try:
            for work in works:
                work()
        except CheckpointException as found:  # of all processes; the first knows why
            error = found
        error, self._held = error or self._held, None

        def judge() -> None:
            if error is not None and torch.distributed.get_rank() == 0:
                raise failed(checkpoint, error) from error

        agreed(judge)
        if checkpoint.parent == Path(self._args.save):
            self._standing = int(checkpoint.name.removeprefix("iter_"))

    def _hold(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Keep what the disk answers until all processes meet, and do nothing more until then."""

        def hold(*arguments: Any) -> None:
            if self._held is not None:
                return
            try:
                work(*arguments)
            except OSError as error:
                self._held = error

        return hold


def least_bytes(args: Namespace, num_parameters: int) -> int:
    """Give the least that a checkpoint takes: the weights, the optimizer's own, Adam's moments."""
    is_half = args.bf16 or args.fp16
    each: int = 2 if is_half else 4
    if not args.no_save_optim:
        each += args.main_params_dtype.itemsize if is_half else 0
        if args.optimizer == "adam":
            each += args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    return each * num_parameters


def newest_iteration(folder: Path) -> int | None:
    """Give the iteration that a folder's tracker names; None where there is none."""
    try:
        return int((folder / TRACKER).read_text())
    except (OSError, ValueError):
        return None


def failed(checkpoint: Path, error: BaseException) -> MachineError:
    """Make one error of what a save ended in; what is half-written goes, where it can.

    What the tracker names is whole, and stays.
    """
    folder = checkpoint.parent
    newest = newest_iteration(folder)
    is_whole = newest is not None and _checkpoint(folder, newest) == checkpoint
    rest = (
        "What was written of it is removed"
        if not is_whole and remove(checkpoint)
        else "What is there of it stays; the next save of that iteration replaces it"
    )
    last = (
        "there is no whole checkpoint there yet"
        if newest is None
        else f"the last whole checkpoint is {_checkpoint(folder, newest).name}"
    )
    return MachineError(
        f"{checkpoint} could not be written: {_reason(error)}. {rest}; {last}. Make room or mend "
        "the folder, then give the same command again."
    )


def _reason(error: BaseException) -> str:
    """Find the words of the disk in what the engine wraps them in."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    for rank, (of_rank, _) in sorted(failures.items()):
        said = str(of_rank).rpartition("error: ")[2].strip().rstrip(".")
        return f"{said} (rank {rank})"
    said = str(error).strip().rstrip(".")
    return said if isinstance(error, OSError) else f"torch wrote no whole file ({said})"


def _is_same(load: str | None, save: str) -> bool:
    return load is not None and Path(load) == Path(save)


def _checkpoint(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def _name_as_newest(folder: Path, iteration: int | None) -> None:
    """Have the tracker name another checkpoint, or none where there is no other."""
    if iteration is None:
        (folder / TRACKER).unlink()
    else:
        replace_text(folder / TRACKER, str(iteration))
