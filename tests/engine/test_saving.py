"""Saving a checkpoint whole or not at all."""

import resource
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import MachineError
from tests.support.world import run_in_world

cpu.activate()

from megatron_mlr1.engine.saving import Saving, failed, least_bytes  # noqa: E402
from megatron_mlr1.engine.start import TRACKER  # noqa: E402


def arguments(save: Path, **other: Any) -> Namespace:
    fields = {"save": str(save), "load": str(save), "iteration": 0, "async_save": False}
    fields |= {"bf16": True, "fp16": False, "no_save_optim": False, "optimizer": "adam"}
    fields |= dict.fromkeys(
        ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32
    )
    fields |= {"skip_train": False}
    return Namespace(**(fields | other))


def test_the_least_size_is_weights_and_the_state_of_the_optimizer(tmp_path):
    assert least_bytes(arguments(tmp_path), 1000) == 14_000
    assert least_bytes(arguments(tmp_path, bf16=False), 1000) == 12_000
    assert least_bytes(arguments(tmp_path, no_save_optim=True), 1000) == 2_000
    assert least_bytes(arguments(tmp_path, optimizer="sgd"), 1000) == 6_000


def test_a_run_whose_checkpoint_has_no_room_does_not_begin(tmp_path):
    with pytest.raises(MachineError, match="a checkpoint of this run takes"):
        Saving(arguments(tmp_path), 10**17)
    Saving(arguments(tmp_path), 10)
    Saving(arguments(tmp_path, skip_train=True), 10**17)


def test_a_failed_save_leaves_nothing_and_says_what_is_left(tmp_path):
    half = tmp_path / "iter_0000010"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    error = failed(half, OSError(28, "No space left on device"))
    assert "[Errno 28] No space left on device" in str(error)
    assert "there is no whole checkpoint there yet" in str(error)
    assert not half.exists()
    (tmp_path / TRACKER).write_text("5")
    assert "the last whole checkpoint is iter_0000005" in str(failed(half, OSError("x")))


def test_what_the_tracker_names_stays_whatever_fails_after_it_was_whole(tmp_path):
    whole = tmp_path / "iter_0000010"
    whole.mkdir()
    (tmp_path / TRACKER).write_text("10")
    assert "stays; the next save of that iteration" in str(failed(whole, OSError("x")))
    assert whole.is_dir()


def bodies(folder: Path) -> list[str]:
    """Save three times: where metadata cannot be written, again, and over what stands."""
    from functools import partial

    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    saving = Saving(arguments(folder), 10)
    rank = torch.distributed.get_rank()
    said: list[str] = []

    def write(checkpoint: Path) -> None:
        if rank == 0:
            saving._hold(save_config)(CheckpointingConfig("torch_dist"), str(checkpoint))
        torch.distributed.barrier()

    def engine_save(iteration: int, *, broken: bool) -> None:
        checkpoint = folder / f"iter_{iteration:07d}"
        if broken and rank == 0:
            (checkpoint / "metadata.json").mkdir()
        torch.distributed.barrier()
        saving._finish(checkpoint, [partial(write, checkpoint)])
        if rank == 0:
            (folder / TRACKER).write_text(str(iteration))
        said.append(f"saved {iteration}")

    for iteration, broken in ((5, False), (10, True), (10, False), (10, False)):
        try:
            saving._save(engine_save, iteration, broken=broken)
        except MachineError as error:
            said.append(str(error))
    return said


def test_what_the_first_process_alone_cannot_write_ends_the_save_in_all(tmp_path):
    (tmp_path / "meet").mkdir()
    folder = tmp_path / "save"
    first, second = run_in_world(2, bodies, tmp_path / "meet", folder)
    assert first == second
    assert first[0] == "saved 5"
    assert "iter_0000010 could not be written: [Errno 21] Is a directory" in first[1]
    assert "is removed; the last whole checkpoint is iter_0000005" in first[1]
    assert first[2:] == ["saved 10"], "a state that is saved is not saved again"
    assert (folder / "iter_0000010" / "metadata.json").is_file()


def of_torch(folder: Path) -> list[str]:
    """Save by `torch.save` where no file may grow; and fail in a way that is not the disk's."""
    saving = Saving(arguments(folder), 10)
    said: list[str] = []

    def engine_save(iteration: int, reason: str) -> None:
        if reason:
            raise RuntimeError(reason)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            torch.save(torch.zeros(100_000), folder / "iter_0000010" / "all.pt")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    for reason in ("", "shapes differ"):
        try:
            saving._save(engine_save, 10, reason)
        except (MachineError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_torchs_own_files_fail_in_the_same_words_and_other_faults_are_not_the_disks(tmp_path):
    (tmp_path / "meet").mkdir()
    (said,) = run_in_world(1, of_torch, tmp_path / "meet", tmp_path / "save")
    assert said[0].startswith("MachineError: ")
    assert "iter_0000010 could not be written: torch wrote no whole file" in said[0]
    assert said[1] == "RuntimeError: shapes differ"
    assert not (tmp_path / "save" / "iter_0000010" / "all.pt").exists()


def replaced(folder: Path) -> list[str]:
    """Go back to iteration 5 of a folder whose newest is 10, and come to another state of 10."""
    saving = Saving(arguments(folder, iteration=5), 10)
    seen: list[str] = []

    def engine_save(iteration: int) -> None:
        seen.append((folder / TRACKER).read_text())
        seen.extend(path.name for path in (folder / "iter_0000010").iterdir())

    saving._save(engine_save, 10)
    return seen


def kept_elsewhere(folder: Path) -> list[str]:
    """Save a checkpoint of the kind of which the engine keeps the newest alone."""
    where = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": None}
    saving = Saving(arguments(folder, **where), 10)
    seen: list[str] = []

    def engine_save(iteration: int, *, non_persistent_ckpt: bool) -> None:
        seen.extend(path.name for path in (folder / "non_persistent").iterdir())

    saving._save(engine_save, 10, non_persistent_ckpt=True)
    return seen


def test_an_empty_folder_does_not_push_out_the_newest_that_is_whole(tmp_path):
    (tmp_path / "meet").mkdir()
    (tmp_path / "save" / "non_persistent" / "iter_0000005").mkdir(parents=True)
    (seen,) = run_in_world(1, kept_elsewhere, tmp_path / "meet", tmp_path / "save")
    assert seen == ["iter_0000005"]


def test_what_is_written_over_is_not_named_as_the_newest_meanwhile(tmp_path):
    (tmp_path / "meet").mkdir()
    for iteration in (5, 10):
        (tmp_path / "save" / f"iter_{iteration:07d}").mkdir(parents=True)
        (tmp_path / "save" / f"iter_{iteration:07d}" / "__0_0.distcp").write_bytes(b"whole")
    (tmp_path / "save" / TRACKER).write_text("10")
    (seen,) = run_in_world(1, replaced, tmp_path / "meet", tmp_path / "save")
    assert seen == ["5"], "the tracker named the checkpoint that stays; the other's files were gone"
