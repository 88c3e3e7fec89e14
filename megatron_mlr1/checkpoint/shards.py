"""Hugging Face's weight files: safetensors, one file or several with an index.

The library reads them. Writing is ours because the library wants all tensors in memory at once,
twice. The format is a length (8 bytes, little endian), a JSON header of that length and the bytes
of the tensors (https://github.com/huggingface/safetensors#format), so each tensor can go to its
place alone.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mlr1.checkpoint.folder import write_text
from megatron_mlr1.checkpoint.names import TIED_HEAD
from megatron_mlr1.errors import CheckpointError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WORDS: Final = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class _Stored:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class ShardReader:
    """The weights of a Hugging Face folder, by name; reads a tensor when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            CheckpointError: no safetensors, a shard that is missing or truncated, tensors that
                differ from the index, or a type that is no floating-point type.
        """
        self.folder = folder
        self._stored: dict[str, _Stored] = {}
        for path, promised in _files(folder).items():
            found = _header(path)
            if promised is not None and promised != set(found):
                name = min(promised ^ set(found))
                raise CheckpointError(
                    f"{path}: {name} is in {'it' if name in found else INDEX} only; index and "
                    "shards must agree. Take all files from the same save."
                )
            self._stored |= found

    @property
    def names(self) -> set[str]:
        """Name every tensor."""
        return set(self._stored)

    @property
    def dtype(self) -> torch.dtype:
        """Give the one type of all weights.

        Raises:
            CheckpointError: there are several.
        """
        dtypes = {stored.dtype for stored in self._stored.values()}
        if len(dtypes) != 1:
            words = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise CheckpointError(
                f"{self.folder} has weights of several types ({words}); there must be one. Load "
                "and save the model with one dtype first."
            )
        return dtypes.pop()

    def shape(self, name: str) -> tuple[int, ...]:
        """Give a tensor's shape."""
        return self._stored[name].shape

    def read(self, name: str) -> Tensor:
        """Read one tensor; its file is mapped only as long as the tensor lives.

        Raises:
            CheckpointError: the file is not what it was.
        """
        with _opened(self._stored[name].path) as weights:
            tensor: Tensor = weights.get_tensor(name)
        return tensor

    def check_tied_head(self) -> None:
        """Check that an output head, if it is stored at all, is the embedding.

        Raises:
            CheckpointError: it is another one.
        """
        head, embedding = TIED_HEAD
        if head in self._stored and not torch.equal(self.read(head), self.read(embedding)):
            raise CheckpointError(
                f"{self.folder}: {head} differs from {embedding}; a MobileLLM-R1 has one weight "
                "for both. The model was untied or trained with two heads and cannot be converted."
            )


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Give each weight file with the names that an index promises, or None without an index."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; the weights must be safetensors. If they "
            "are in another format, load the model with transformers and save it with "
            "save_pretrained."
        )
    promised: dict[Path, set[str] | None] = {}
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        for name, file in weight_map.items():
            promised[folder / file] = (promised.get(folder / file) or set()) | {name}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is no index of safetensors shards ({error}); it must have a "
            "weight_map. Take it from the model's own save."
        ) from error
    return promised


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is missing, truncated or no safetensors file ({error}). Copy or download it "
            "again."
        ) from error


def _header(path: Path) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    with _opened(path) as weights:
        for name in weights.keys():  # noqa: SIM118  it is not a mapping
            part = weights.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} has type {part.get_dtype()}; it must be one of "
                    f"{', '.join(DTYPES)}. Quantised weights must be dequantised first."
                )
            stored[name] = _Stored(path, tuple(part.get_shape()), dtype)
    return stored


class ShardWriter:
    """Writes weights into a folder one tensor at a time, in any order."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        max_shard_bytes: int,
    ) -> None:
        """Lay out the files.

        Args:
            folder: an existing folder.
            shapes: every tensor that will be written.
            dtype: the type of all of them.
            max_shard_bytes: begin another file before one would grow beyond this.
        """
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._streams: list[BinaryIO] = []
        self.num_bytes = sum(_num_bytes(shape, dtype) for shape in shapes.values())
        shards = _pack(shapes, dtype, max_shard_bytes)
        files = [SINGLE]
        if len(shards) > 1:
            files = [
                f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
            ]
            weight_map = {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            }
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        for file, names in zip(files, shards, strict=True):
            self._begin(folder / file, names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for stream in self._streams:
            with stream:
                if kind is None:
                    stream.flush()
                    os.fsync(stream.fileno())
        assert kind or not self._shapes, f"never written: {sorted(self._shapes)}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place, in the type of the file."""
        assert self._shapes.pop(name) == tuple(tensor.shape), f"{name}: {tuple(tensor.shape)}"
        stream, offset = self._places[name]
        stream.seek(offset)
        stored = tensor.to(self._dtype).contiguous().flatten().view(torch.uint8)
        stream.write(memoryview(stored.numpy()))

    def _begin(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + _num_bytes(self._shapes[name], self._dtype)
            header[name] = {
                "dtype": _WORDS[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream = path.open("wb")
        self._streams.append(stream)
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        stream.truncate(start + offset)
        for name in names:
            begin = header[name]["data_offsets"][0]  # type: ignore[index]
            self._places[name] = (stream, start + begin)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _pack(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in sorted(shapes):
        size = _num_bytes(shapes[name], dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
