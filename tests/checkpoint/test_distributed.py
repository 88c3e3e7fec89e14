"""Distributed checkpoint files: what is read, and what is refused."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mlr1.checkpoint.distributed import DistributedReader
from megatron_mlr1.checkpoint.names import BY_MEGATRON, Place, places
from megatron_mlr1.errors import CheckpointError

Run = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return shutil.copytree(run[0] / "iter_0000005", tmp_path / "iter_0000005")


def test_weights_are_read_and_all_else_is_left(folder: Path, run: Run) -> None:
    reader = DistributedReader(folder)
    assert reader.names == set(BY_MEGATRON)
    for place in places(2):
        if place.row.megatron.endswith("linear_proj.weight"):
            name = f"decoder.layers.{place.layer}.self_attention.linear_proj.weight"
            assert torch.equal(reader.read(place), run[1][name])


def test_the_runs_arguments_are_read(folder: Path) -> None:
    common = DistributedReader(folder).common()
    assert common["iteration"] == 5
    assert common["args"].rotary_base == 50_000


def test_another_format_is_refused(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="format zarr; it must be a torch_dist"):
        DistributedReader(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no metadata\.json"):
        DistributedReader(folder)


def test_chunks_that_were_never_written_are_missed(folder: Path) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    row = BY_MEGATRON["decoder.layers.mlp.linear_fc2.weight"]
    entry = metadata.state_dict_metadata[row.megatron]
    assert isinstance(entry, TensorStorageMetadata)
    del entry.chunks[1]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = DistributedReader(folder)
    reader.read(Place(row, 0))
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight of layer 1 do not cover"):
        reader.read(Place(row, 1))


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps({"not": "metadata"})],
    ids=["empty", "garbage", "something else"],
)
def test_damaged_metadata_is_refused(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="missing, damaged or not safe"):
        DistributedReader(folder)


def test_metadata_runs_no_code(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match="which describes no tensor"):
        DistributedReader(folder)
    assert not (tmp_path / "harm").exists()


def test_arguments_of_older_engines_are_read_and_run_no_code(folder: Path, tmp_path: Path) -> None:
    torch.save({"args": None, "iteration": 4}, folder / "common.pt")
    assert DistributedReader(folder).common()["iteration"] == 4
    torch.save(Hostile(tmp_path / "harm"), folder / "common.pt")
    with pytest.raises(CheckpointError, match="arguments cannot be read"):
        DistributedReader(folder).common()
    assert not (tmp_path / "harm").exists()
