"""Megatron's distributed checkpoint files (`torch_dist`), one weight at a time.

The files are torch's distributed checkpoints: `.metadata` says which rectangle ("chunk") of which
global tensor lies where in which `*.distcp`. So any part of a global tensor can be read without a
model and whatever the layout of the run, and a checkpoint can be written without either.
"""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import (
    CheckpointingConfig,
    CheckpointingException,
    maybe_load_config,
    save_config,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mlr1.checkpoint.names import Place
from megatron_mlr1.errors import CheckpointError

FORMAT: Final = "torch_dist"
COMMON: Final = "common_state/shard_0_1"
"""Where the engine keeps what is no tensor; older ones have `common.pt` beside the shards."""
_DAMAGE: Final = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
)
"""What torch raises on a file that is not what it was when it was written."""
_METADATA_MODULE: Final = "torch.distributed.checkpoint.metadata"
_METADATA_GLOBALS: Final = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name from Python 3.13 on
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what describes tensors, and refuses whatever else a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        is_description = module == _METADATA_MODULE and "." not in name
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_description or is_dtype or (module, name) in _METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class _OneTensor(DefaultLoadPlanner):
    """Receives the parts of one rectangle of a global tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        parts = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.target[tuple(slice(offset, offset + length) for offset, length in parts)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Leave it: the part was copied into its place."""


class DistributedReader:
    """The global tensors of one `iter_*` or `release` folder."""

    def __init__(self, folder: Path) -> None:
        """Read what the folder holds, and check that its files are whole.

        Raises:
            CheckpointError: not this format, or a file that is missing, truncated or not safe to
                read.
        """
        self.folder = folder
        config = maybe_load_config(str(folder))
        if config is None or config.sharded_backend != FORMAT:
            has = "no metadata.json" if config is None else f"format {config.sharded_backend}"
            raise CheckpointError(
                f"{folder} has {has}; it must be a {FORMAT} checkpoint. Save with --ckpt-format "
                f"{FORMAT} (the engine's default), or copy the folder whole."
            )
        self._metadata = _read_metadata(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _is_optimizer_state(name)
        }
        self._check_files()

    @property
    def names(self) -> set[str]:
        """Name every tensor of the model; the optimizer's are left out."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a global tensor's shape; layers are its first dimension where there are layers."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Give a tensor's type."""
        return self._tensors[name].properties.dtype

    def read(self, place: Place) -> Tensor:
        """Read one weight, of one layer where it has layers.

        Raises:
            CheckpointError: a file is damaged, or chunks are missing.
        """
        name, entry = place.row.megatron, self._tensors[place.row.megatron]
        first = (0 if place.layer is None else place.layer, *(0,) * (len(entry.size) - 1))
        size = entry.size if place.layer is None else torch.Size((1, *entry.size[1:]))
        wanted = ChunkStorageMetadata(offsets=torch.Size(first), sizes=size)
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != size.numel():
            raise CheckpointError(
                f"{self.folder}: the chunks of {place} do not cover its shape {list(size)}; some "
                "were never written. Take another iteration."
            )
        target = torch.empty(size, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target))
        except _DAMAGE as error:
            raise CheckpointError(
                f"{self.folder}: {place} cannot be read ({_first_line(error)}); a *.distcp file is "
                "damaged. Copy the folder again, or take another iteration."
            ) from error
        return target if place.layer is None else target[0]

    def common(self) -> dict[str, Any]:
        """Read what is no tensor, among it the run's arguments.

        Raises:
            CheckpointError: it is damaged, or holds objects that are not safe to load.
        """
        try:
            # The engine's own loader; torch lets nothing in it run (weights_only).
            common: dict[str, Any] = load_common_state_dict(self.folder)
        except (*_DAMAGE, CheckpointException, CheckpointingException) as error:
            raise CheckpointError(
                f"{self.folder}: the run's arguments cannot be read ({_first_line(error)}). The "
                "folder is damaged or was written by another version of the engine; take another "
                "iteration."
            ) from error
        return common

    def _check_files(self) -> None:
        """Compare each file's length with the end of the last thing that must be in it."""
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for file, end in sorted(ends.items()):
            path = self.folder / file
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                has = "is missing" if size is None else f"is truncated: {size} bytes"
                raise CheckpointError(
                    f"{path} {has}; it must have at least {end} bytes. Copy the checkpoint again, "
                    "or take another iteration."
                )


def _is_optimizer_state(name: str) -> bool:
    return name.startswith(("optimizer.", "chained_"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / ".metadata").open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    except (*_DAMAGE, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / '.metadata'} is missing, damaged or not safe to read "
            f"({_first_line(error)}). Copy the checkpoint again, from where you trust it."
        ) from error
    return metadata


class _Streamed(DefaultSavePlanner):
    """Makes each weight when the writer comes to it."""

    def __init__(self, weights: dict[MetadataIndex, Callable[[], Any]]) -> None:
        super().__init__()
        self.weights = weights

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.weights[write_item.index]()


def write_distributed(
    folder: Path,
    weights: Iterable[tuple[Place, tuple[int, ...]]],
    make: Callable[[Place], Tensor],
    *,
    dtype: torch.dtype,
    num_layers: int,
    objects: dict[str, object],
) -> None:
    """Write a checkpoint that the engine loads in any layout.

    Args:
        folder: an existing folder.
        weights: every weight with its shape, that of one layer where it has layers.
        make: gives a weight's tensor; asked once for each, one at a time.
        dtype: the type of all of them.
        num_layers: layers of the model.
        objects: what is no tensor, by its name in the checkpoint.
    """
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in objects}
    sources: dict[MetadataIndex, Callable[[], Any]] = {}
    items = []
    for name, value in objects.items():
        index = MetadataIndex(name)
        items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))
        sources[index] = _serializer(value)
    properties = TensorProperties(dtype=dtype)
    for place, shape in weights:
        name, chunk, size = place.row.megatron, *_rectangle(place, shape, num_layers)
        entry = entries.setdefault(name, TensorStorageMetadata(properties, size, []))
        entry.chunks.append(chunk)
        index = MetadataIndex(name, chunk.offsets)
        data = TensorWriteData(chunk=chunk, properties=properties, size=size)
        items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        sources[index] = _shaper(make, place, chunk.sizes)
    _write(folder, items, sources, Metadata(entries))


def _rectangle(
    place: Place, shape: tuple[int, ...], num_layers: int
) -> tuple[ChunkStorageMetadata, torch.Size]:
    """Give a weight's chunk, and the size of the global tensor that the chunk is part of."""
    if place.layer is None:
        whole = torch.Size(shape)
        return ChunkStorageMetadata(offsets=torch.Size((0,) * len(shape)), sizes=whole), whole
    offsets = torch.Size((place.layer, *(0,) * len(shape)))
    return (
        ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((1, *shape))),
        torch.Size((num_layers, *shape)),
    )


def _serializer(value: object) -> Callable[[], io.BytesIO]:
    def serialize() -> io.BytesIO:
        stream = io.BytesIO()
        # The engine stores a list of the shards that one process holds; here there is one.
        torch.save([value], stream)
        return stream

    return serialize


def _shaper(
    make: Callable[[Place], Tensor], place: Place, size: torch.Size
) -> Callable[[], Tensor]:
    return lambda: make(place).view(size).contiguous()


def _write(
    folder: Path,
    items: list[WriteItem],
    sources: dict[MetadataIndex, Callable[[], Any]],
    metadata: Metadata,
) -> None:
    # Nothing is copied ahead: one weight is in memory at a time.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(SavePlan(items))
    (plan,) = writer.prepare_global_plan([plan])
    results = writer.write_data(plan, _Streamed(sources)).wait()
    writer.finish(metadata, [results])
    save_config(CheckpointingConfig(FORMAT), str(folder))


def empty_state_names(names: Iterable[str], num_layers: int) -> Iterator[str]:
    """Name the entries under which the engine looks for states that are empty here."""
    for name in names:
        if ".layers." in name:
            yield from (f"{name}/shard_{layer}_{num_layers}" for layer in range(num_layers))
        else:
            yield f"{name}/shard_0_1"
