"""What a run's checkpoints say about themselves, and which are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_mlr1.checkpoint.architecture import Architecture
from megatron_mlr1.checkpoint.convert import hf_to_megatron
from megatron_mlr1.checkpoint.megatron import FIXED, TRACKER, MegatronCheckpoint
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.build import build
from megatron_mlr1.model.one_process import one_process

Run = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture
def changed(run: Run, tmp_path: Path) -> Callable[..., MegatronCheckpoint]:
    """Open a copy of the run whose arguments are others; older engines keep them in a file."""

    def open_with(**changes: Any) -> MegatronCheckpoint:
        root = shutil.copytree(run[0], tmp_path / "run")
        common = MegatronCheckpoint(root, None).reader.common()
        for name, value in changes.items():
            setattr(common["args"], name, value)
        torch.save(common, root / "iter_0000005/common.pt")
        return MegatronCheckpoint(root, None)

    return open_with


def test_sizes_come_from_the_runs_arguments(run: Run, architecture: Architecture) -> None:
    checkpoint = MegatronCheckpoint(run[0], None)
    assert checkpoint.architecture(300) == architecture
    assert checkpoint.embedding_rows == 320
    assert checkpoint.padding_multiple == 64
    assert checkpoint.recorded_vocabulary is None


def test_a_vocabulary_given_by_hand_is_known(changed: Callable[..., MegatronCheckpoint]) -> None:
    assert changed(vocab_size=301).recorded_vocabulary == 301


def test_heads_without_groups_are_groups_of_one(
    changed: Callable[..., MegatronCheckpoint],
) -> None:
    with pytest.raises(CheckpointError, match=r"linear_qkv\.weight has shape \[2, 64, 16\]"):
        changed(group_query_attention=False).architecture(300)


@pytest.mark.parametrize("name", FIXED)
def test_another_architecture_is_refused_by_the_field(
    changed: Callable[..., MegatronCheckpoint], name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"unknown architecture: {name} is 'another'"):
        changed(**{name: "another"})


@pytest.mark.parametrize(
    ("name", "value"), [("num_experts", 8), ("no_rope_freq", 4), ("add_qkv_bias", True)]
)
def test_what_would_add_to_the_architecture_is_refused(
    changed: Callable[..., MegatronCheckpoint], name: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=f"unknown architecture: {name} is {value}"):
        changed(**{name: value})


def test_a_size_that_the_weights_do_not_have_is_refused(
    changed: Callable[..., MegatronCheckpoint],
) -> None:
    with pytest.raises(CheckpointError, match=r"has shape \[2, 16\]; .* must have \[3, 16\]"):
        changed(num_layers=3).architecture(300)


def test_sizes_that_are_no_sizes_are_refused(changed: Callable[..., MegatronCheckpoint]) -> None:
    with pytest.raises(CheckpointError, match="hidden_size is None"):
        changed(hidden_size=None).architecture(300)


def test_a_folder_without_a_run_is_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(CheckpointError, match=TRACKER):
        MegatronCheckpoint(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"Iterations that are: iter_0000003, iter_0000005\."):
        MegatronCheckpoint(run[0], 4)
    (tmp_path / TRACKER).write_text("latest")
    with pytest.raises(CheckpointError, match="says 'latest'"):
        MegatronCheckpoint(tmp_path, None)


def test_the_engine_has_the_very_entries_that_were_written(
    hf_folder: Callable[..., Path], tmp_path: Path, architecture: Architecture
) -> None:
    hf_to_megatron(hf_folder(), tmp_path / "megatron")
    with one_process() as groups:
        model = build(architecture.shape, groups, rotary_base=50_000.0, max_positions=64)
        wanted = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        _, only_here, only_wanted = dist_checkpointing.load(
            {"model": wanted}, str(tmp_path / "megatron/release"), strict="return_all"
        )
    assert (only_here, only_wanted) == (set(), set())
