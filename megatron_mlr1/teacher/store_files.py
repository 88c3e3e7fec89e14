"""The files of a target store: shards of records, and their indexes. Arrow IPC files throughout.

`NAME.arrow` holds one record batch for each sequence: a row for each token, a column for each array
of the targets, as any reader of Arrow sees them. The batch's own metadata hold `key`, the content
key in hex, and `xxh3`, the XXH3-64 of key and columns. Ids below 2^17 are split without loss into
`ids_low`, their low 16 bits, and `ids_high`, the 17th bits, eight to a byte, first id lowest.

`NAME.keys` holds the index of that shard: a row for each record, sorted by `high`, `low` (the key
as two little-endian u64), and `place`, the number of its batch. A shard without an index is not
finished and is not read.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from megatron_mlr1.errors import DataError, MachineError
from megatron_mlr1.teacher.spec import ArrayLayout

SHARD: Final = ".arrow"
INDEX: Final = ".keys"
PARTIAL: Final = ".partial"
ABANDONED_S: Final = 24 * 3600.0
"""A file that nobody has written to for so long, and that was not finished, is removed."""
MAX_SPLIT_IDS: Final = 2**17

type Arrays = Mapping[str, NDArray[Any]]


def _split_ids(ids_RN: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    high_RN = (ids_RN >> 16).astype(np.uint8)
    high_RB = np.packbits(high_RN, axis=1, bitorder="little")
    return {"ids_low": ids_RN.astype("<u2"), "ids_high": high_RB}


def _join_ids(low_RN: NDArray[np.uint16], high_RB: NDArray[np.uint8]) -> NDArray[np.int32]:
    high_RN = np.unpackbits(high_RB, axis=1, count=low_RN.shape[1], bitorder="little")
    ids_RN: NDArray[np.int32] = low_RN.astype("<i4") | (high_RN.astype("<i4") << 16)
    return ids_RN


def _columns(arrays: Arrays, vocab_size: int) -> dict[str, NDArray[Any]]:
    """Give the arrays as they are stored."""
    columns: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        splits = name == "ids" and vocab_size <= MAX_SPLIT_IDS
        columns |= _split_ids(array) if splits else {name: array}
    return columns


def _as_arrow(array: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _as_numpy(column: pa.Array) -> NDArray[Any]:
    is_list = pa.types.is_fixed_size_list(column.type)
    flat: NDArray[Any] = (column.flatten() if is_list else column).to_numpy()
    return flat.reshape(len(column), -1) if is_list else flat


def _mark(key: bytes, columns: Mapping[str, NDArray[Any]]) -> str:
    hasher = xxhash.xxh3_64(key)
    for name, array in columns.items():
        hasher.update(name.encode())
        hasher.update(memoryview(np.ascontiguousarray(array).reshape(-1).view("u1")))
    return hasher.hexdigest()


def as_record(
    key: bytes, columns: Mapping[str, NDArray[Any]]
) -> tuple[pa.RecordBatch, dict[str, str]]:
    """Give the batch of a record, and its metadata."""
    batch = pa.record_batch({name: _as_arrow(array) for name, array in columns.items()})
    return batch, {"key": key.hex(), "xxh3": _mark(key, columns)}


def read_record(stream: pa.RecordBatchFileReader, place: int, key: bytes) -> dict[str, Any]:
    """Give the columns of a record, read-only.

    Raises:
        ValueError: the record is not what was written under that key.
    """
    batch, notes = stream.get_batch_with_custom_metadata(place)
    columns = {name: _as_numpy(batch.column(name)) for name in batch.schema.names}
    told = {name.decode(): value.decode() for name, value in dict(notes or {}).items()}
    if told != {"key": key.hex(), "xxh3": _mark(key, columns)}:
        raise ValueError(f"its record {place} does not fit its checksum")
    return columns


class ShardWriter:
    """Writes one shard as a stream; it has no name that a reader looks for before it is whole."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        """Open a shard.

        Args:
            folder: of the store.
            vocab_size: of the teacher; decides how ids are kept.

        Raises:
            MachineError: the folder cannot be written.
        """
        self._folder, self._vocab_size = folder, vocab_size
        self._name = uuid.uuid4().hex
        self._partial = folder / f"{self._name}{SHARD}{PARTIAL}"
        self._places: dict[bytes, int] = {}
        self._stream: pa.RecordBatchFileWriter | None = None
        self.num_bytes = 0
        with names_the_store(folder):
            self._file: BinaryIO = self._partial.open("xb")

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, key: bytes, arrays: Arrays) -> None:
        """Append a record.

        Raises:
            MachineError: the disk is full or failed; what was written of the shard is removed.
        """
        columns = _columns(arrays, self._vocab_size)
        batch, notes = as_record(key, columns)
        try:
            with names_the_store(self._folder):
                if self._stream is None:
                    self._stream = pa.ipc.new_file(self._file, batch.schema)
                self._stream.write_batch(batch, custom_metadata=notes)
        except MachineError:
            self.discard()
            raise
        self._places[key] = len(self._places)
        self.num_bytes += batch.nbytes

    def publish(self) -> None:
        """Force the shard and its index to the disk, then give them their names, the index last.

        Raises:
            MachineError: the disk is full or failed; nothing of the shard is there then.
        """
        index = self._folder / f"{self._name}{INDEX}{PARTIAL}"
        try:
            with names_the_store(self._folder):
                if self._stream is not None:
                    self._stream.close()
                to_disk(self._file)
                self._file.close()
                with index.open("xb") as file:
                    self._write_index(file)
                    to_disk(file)
                self._partial.replace(self._folder / f"{self._name}{SHARD}")
                index.replace(self._folder / f"{self._name}{INDEX}")
                flush_folder(self._folder)
        except MachineError:
            index.unlink(missing_ok=True)
            self.discard()
            raise

    def discard(self) -> None:
        """Remove an unfinished shard."""
        with suppress(OSError):  # closing flushes, which fails again where the disk is full
            self._file.close()
        self._partial.unlink(missing_ok=True)
        self._places.clear()

    def _write_index(self, file: BinaryIO) -> None:
        keys = np.frombuffer(b"".join(self._places), "<u8").reshape(-1, 2)
        places = np.fromiter(self._places.values(), "<u4")
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        batch = pa.record_batch(
            {"high": keys[order, 0], "low": keys[order, 1], "place": places[order]}
        )
        with pa.ipc.new_file(file, batch.schema) as stream:
            stream.write_batch(batch)


class Shard:
    """A finished shard, mapped into memory: reading copies nothing, but ids that were split."""

    def __init__(self, index: Path) -> None:
        """Map a shard by its index.

        Raises:
            DataError: one of the two files is missing or broken.
        """
        self.path = index.with_suffix(SHARD)
        with refuses_broken(index):
            keys = pa.ipc.open_file(pa.memory_map(str(index))).get_batch(0)
        with refuses_broken(self.path):
            self._records = pa.ipc.open_file(pa.memory_map(str(self.path)))
        columns = (keys.column(name).to_numpy() for name in ("high", "low", "place"))
        self._high, self._low, self._places = columns

    def __len__(self) -> int:
        return int(self._places.size)

    def find(self, key: bytes) -> int | None:
        """Give the place of a record; None where the shard does not hold it."""
        high, low = np.frombuffer(key, "<u8")
        begin = int(np.searchsorted(self._high, high))
        while begin < self._high.size and self._high[begin] == high:
            if self._low[begin] == low:
                return int(self._places[begin])
            begin += 1
        return None

    def read(self, place: int, key: bytes, wanted: tuple[ArrayLayout, ...]) -> dict[str, Any]:
        """Give the arrays of a record, read-only.

        Raises:
            DataError: the record is not what was written.
        """
        with refuses_broken(self.path):
            columns = read_record(self._records, place, key)
            if "ids_low" in columns:
                columns["ids"] = _join_ids(columns.pop("ids_low"), columns.pop("ids_high"))
            return {array.name: columns[array.name] for array in wanted}


def sweep(folder: Path) -> None:
    """Remove unfinished files of writers that are long gone."""
    for path in folder.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # another writer sweeps too
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def flush_folder(folder: Path) -> None:
    """Force the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_disk(file: BinaryIO) -> None:
    """Force what was written to a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def names_the_store(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into ours.

    Raises:
        MachineError: the disk is full or failed, or the folder may not be written.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror or error}. A store of targets needs a folder that may be "
            "written and has room for all targets of the run; mend that and start the run again, "
            "which goes on with what is stored."
        ) from error


@contextmanager
def refuses_broken(path: Path) -> Iterator[None]:
    """Turn whatever a broken file makes Arrow say into our error.

    Raises:
        DataError: the file is missing, cut short, or not what was written.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is no whole file of a target store: {error}. Remove it and the file of the "
            "same name beside it, and have its targets made again by `tiered:`."
        ) from error
