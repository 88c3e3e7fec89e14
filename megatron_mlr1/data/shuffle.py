"""A corpus in a new order of its documents, in constant memory: two passes over the disk.

Every document has two numbers of 64 bits. Its content hash u is BLAKE2b of the bytes of its tokens
and knows nothing else. Its place is the output of SplitMix64 (Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators") for the seed and the document's number. The documents
whose u lies in the top 1/32 stand last, by u and then number; all others stand before, by place.

So the last p % of the documents (p <= 3.1) are those of highest content hash, whatever the seed,
the order of the input, or what a later run adds; equal documents fall on one side of every border.

The first pass deals the documents out to buckets by these numbers, the second sorts each bucket in
memory. Memory: the buffers of the first or one bucket of the second, below 0.4 GB for any corpus.
"""

import hashlib
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.disk import (
    names_the_file,
    refuse_existing,
    refuse_folders,
    refuse_little_room,
    refuse_nameless,
)
from megatron_mlr1.data.index import IndexWriter, bin_path, idx_path, meta_path, partial_paths
from megatron_mlr1.data.provenance import (
    CorpusRecord,
    read_record,
    record_file,
    refuse_packs,
    write_record,
)
from megatron_mlr1.data.runs import OnProgress, WrittenCorpus, refuse_source
from megatron_mlr1.data.stored_index import (
    StoredIndex,
    count_tokens,
    open_index,
    refuse_wrong_documents,
    refuse_wrong_size,
)
from megatron_mlr1.errors import ConfigError, DataError

TAIL_FRACTION = 1 / 32
"""Share of the content hashes whose documents stand last."""
TAIL_BEGIN = 31 << 59
"""The lowest of them: 31/32 of 2**64."""
BUCKET_BYTES = 128 << 20
"""Memory that the documents of one bucket take."""
DOCUMENT_BYTES = 300
"""Memory that the second pass needs for a document beside its tokens and lengths."""
BUFFERS_BYTES = 64 << 20
"""Memory of all buffers of the first pass."""
GROUP_BYTES = 16 << 20
"""Read at once; a document larger than this is copied from the corpus in the second pass."""
ROW = struct.Struct("<QQQQ?")
"""In a bucket, before a document: its sort key, number, bytes, sequences, and whether it is large.

Behind it: lengths (i32) and tokens; of a large one, where it begins: sequence (u64), byte (u64)."""
LARGE = struct.Struct("<QQ")
Row = tuple[int, int, int, int, int, bool]
"""Key, number, place of the row in the bucket, bytes, sequences, large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShufflePlan:
    """What to shuffle, to where, and how."""

    input_prefix: str
    output_prefix: str
    seed: int
    overwrite: bool = False
    """Replace a corpus that is there."""

    def __post_init__(self) -> None:
        refuse_negative(self.seed)


def refuse_negative(seed: int) -> None:
    """Refuse a seed below zero.

    Raises:
        ConfigError: it is.
    """
    if seed < 0:
        raise ConfigError(f"The seed of the shuffle is {seed}; it must be 0 or more.")


def shuffle(plan: ShufflePlan, on_progress: OnProgress = lambda num_bytes: None) -> WrittenCorpus:
    """Write a corpus in a new order of its documents; a record of the old makes one of the new.

    Args:
        plan: what to do.
        on_progress: called with the bytes of tokens read or written since the last call; both
            passes sum to twice the tokens.

    Raises:
        ConfigError: the output is the input, is there already, or the input holds packs.
        DataError: the input is damaged.
        MachineError: a folder is missing, or the disk is full or failed.
    """
    record = read_record(plan.input_prefix)
    refuse_packs(plan.input_prefix, record, "tools/shuffle_data.py")
    index = open_index(plan.input_prefix)
    num_tokens = count_tokens(index)
    refuse_wrong_documents(index)
    refuse_wrong_size(index, num_tokens)
    refuse_nameless(plan.output_prefix)
    refuse_source(plan.output_prefix, plan.input_prefix)
    if not num_tokens:
        raise DataError(f"{plan.input_prefix} holds no tokens. Leave it out.")
    folder = shuffle_folder(plan.output_prefix)
    prefix = plan.output_prefix
    targets = bin_path(prefix), idx_path(prefix), *partial_paths(prefix)
    if not plan.overwrite:
        refuse_existing(*targets, folder)
    refuse_folders(*targets, meta_path(prefix))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        writer = IndexWriter(
            plan.output_prefix, index.dtype, overwrite=plan.overwrite, hashed=record is not None
        )
        stack.callback(writer.discard)
        shuffle_into(writer, index, plan.seed, folder, on_progress)
        writer.seal()
        writer.publish()
    if record is not None:
        write_record(plan.output_prefix, shuffled_record(record, writer, plan.seed))
    counts = index.num_documents, index.num_sequences, num_tokens
    return WrittenCorpus(plan.output_prefix, *counts, index.dtype)


def shuffle_folder(prefix: str) -> Path:
    """Name the folder of the buckets while the corpus `prefix` is written."""
    return Path(f"{prefix}.shuffle.partial")


def shuffled_record(record: CorpusRecord, writer: IndexWriter, seed: int) -> CorpusRecord:
    """Say of a record that its documents were shuffled to the published files of `writer`."""
    files = {
        end: record_file(Path(f"{writer.prefix}.{end}"), sha256)
        for end, sha256 in writer.sha256.items()
    }
    return replace(record, files=files, shuffled=seed, tail_fraction=TAIL_FRACTION)


def shuffle_into(
    writer: IndexWriter, index: StoredIndex, seed: int, folder: Path, on_progress: OnProgress
) -> None:
    """Write the documents of a sound corpus in their new order.

    Args:
        writer: an empty writer of the same token type; it is neither sealed nor published.
        index: the corpus.
        seed: any integer.
        folder: a folder for the buckets; what is in it goes, and it is gone afterwards.
        on_progress: as of `shuffle`.

    Raises:
        DataError: the corpus became shorter.
        MachineError: the disk is full or failed.
    """
    num_bytes = index.bin_bytes + 4 * index.num_sequences + DOCUMENT_BYTES * index.num_documents
    refuse_little_room(folder.parent, 2 * num_bytes)
    with names_the_file(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    body = _Buckets(folder, "body", -(-num_bytes // BUCKET_BYTES))
    tail = _Buckets(folder, "tail", -(-num_bytes // (BUCKET_BYTES * 16)))
    with names_the_file(bin_path(index.prefix), DataError):
        source = os.open(bin_path(index.prefix), os.O_RDONLY)
    try:
        with names_the_file(folder):
            for group in _groups(index):
                _deal_out(group, source, seed, body, tail)
                on_progress(int(group.begins[-1] - group.begins[0]))
            body.flush()
            tail.flush()
        for bucket in (*body.paths, *tail.paths):
            on_progress(_write_sorted(writer, bucket, source, index))
    finally:
        os.close(source)
    with names_the_file(folder):
        shutil.rmtree(folder)


def places(seed: int, first: int, count: int) -> NDArray[np.uint64]:
    """Give the places of the documents from number `first` on: SplitMix64 of the seed's digest."""
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    z = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring documents of at most `GROUP_BYTES` together, or one larger document."""

    index: StoredIndex
    first: int
    """Number of the first document."""
    ends: NDArray[np.int64]
    """(D + 1,): sequences before the first document, and up to the end of each."""
    begins: NDArray[np.int64]
    """(D + 1,): bytes before the first document, and up to the end of each."""
    large: bool


def _groups(index: StoredIndex) -> Iterator[_Group]:
    first = 0
    ends = begins = np.zeros(1, np.int64)
    for more_ends, more_tokens in index.totals():
        ends = np.concatenate([ends[-1:], more_ends])
        begins = np.concatenate([begins[-1:], more_tokens * index.dtype.itemsize])
        sizes = begins + 4 * ends
        at = 0
        while at < more_ends.size:
            stop = int(np.searchsorted(sizes, sizes[at] + GROUP_BYTES, side="right")) - 1
            large = stop == at
            stop += large
            part = slice(at, stop + 1)
            yield _Group(index, first + at, ends[part], begins[part], large)
            at = stop
        first += more_ends.size


def _deal_out(group: _Group, source: int, seed: int, body: "_Buckets", tail: "_Buckets") -> None:
    count = group.ends.size - 1
    begin, size = int(group.begins[0]), int(group.begins[-1] - group.begins[0])
    if group.large:
        hashed = hashlib.blake2b(digest_size=8)
        for block in _read(source, begin, size):
            hashed.update(block)
        data, lengths = b"", LARGE.pack(int(group.ends[0]), begin)
    else:
        data = b"".join(_read(source, begin, size))
        blocks = group.index.lengths(int(group.ends[0]), int(group.ends[-1]))
        lengths = b"".join(block.tobytes() for block in blocks)
    byte_ends = (group.begins - begin).tolist()
    sequence_ends = (group.ends - group.ends[0]).tolist()
    for number, place in enumerate(places(seed, group.first, count).tolist()):
        begin, end = byte_ends[number : number + 2]
        first, last = sequence_ends[number : number + 2]
        tokens = data[begin:end]
        if not group.large:
            hashed = hashlib.blake2b(tokens, digest_size=8)
        content = int.from_bytes(hashed.digest(), "big")
        row = group.first + number, end - begin, last - first, group.large
        own = lengths if group.large else lengths[4 * first : 4 * last]
        if content >= TAIL_BEGIN:
            tail.add((content - TAIL_BEGIN) << 5, ROW.pack(content, *row), own, tokens)
        else:
            body.add(place, ROW.pack(place, *row), own, tokens)


def _read(source: int, begin: int, size: int) -> Iterator[bytes]:
    while size:
        block = os.pread(source, min(size, GROUP_BYTES), begin)
        if not block:
            raise DataError("A corpus became shorter while it was shuffled. Let it rest.")
        yield block
        begin += len(block)
        size -= len(block)


class _Buckets:
    """Files that share out numbers of 64 bits in order: as many to each as chance gives."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.paths = [folder / f"{name}-{bucket:06d}" for bucket in range(max(1, count))]
        self._buffers = [bytearray() for _ in self.paths]
        self._limit = max(1 << 12, BUFFERS_BYTES // len(self.paths))

    def add(self, key: int, *parts: bytes) -> None:
        bucket = key * len(self.paths) >> 64
        buffer = self._buffers[bucket]
        for part in parts:
            buffer += part
        if len(buffer) >= self._limit:
            self._append(bucket)

    def flush(self) -> None:
        for bucket in range(len(self.paths)):
            self._append(bucket)

    def _append(self, bucket: int) -> None:
        with self.paths[bucket].open("ab", buffering=0) as file:
            data = memoryview(self._buffers[bucket])
            while data:
                data = data[file.write(data) :]
        self._buffers[bucket] = bytearray()


def _write_sorted(writer: IndexWriter, bucket: Path, source: int, index: StoredIndex) -> int:
    """Write the documents of a bucket by key and number, and remove it; give their bytes."""
    with names_the_file(bucket):
        size = bucket.stat().st_size
        # Very many equal documents share a bucket of the tail; it is mapped rather than read.
        data = memoryview(
            bucket.read_bytes() if size <= 2 * BUCKET_BYTES else np.memmap(bucket, np.uint8, "r")
        )
    rows = sorted(_rows(data))
    begin = 0
    while begin < len(rows):
        if rows[begin][5]:
            _copy_large(writer, data, rows[begin], source, index)
            begin += 1
            continue
        end, waiting = begin, 0
        while end < len(rows) and not rows[end][5] and waiting < GROUP_BYTES // 2:
            waiting += rows[end][3] + 4 * rows[end][4]
            end += 1
        _write_rows(writer, data, rows[begin:end], index.dtype)
        begin = end
    bucket.unlink()
    return sum(row[3] for row in rows)


def _rows(data: memoryview) -> Iterator[Row]:
    at, size = 0, len(data)
    while at < size:
        key, number, num_bytes, sequences, large = ROW.unpack_from(data, at)
        yield key, number, at + ROW.size, num_bytes, sequences, large
        at += ROW.size + (LARGE.size if large else 4 * sequences + num_bytes)


def _write_rows(
    writer: IndexWriter, data: memoryview, rows: list[Row], dtype: np.dtype[Any]
) -> None:
    lengths, tokens = [], []
    for _, _, at, num_bytes, sequences, _ in rows:
        begin = at + 4 * sequences
        lengths.append(data[at:begin])
        tokens.append(data[begin : begin + num_bytes])
    writer.write_tokens(np.frombuffer(b"".join(tokens), dtype))
    counts = np.array([row[4] for row in rows], np.int64)
    writer.write_documents(np.frombuffer(b"".join(lengths), "<i4"), counts)


def _copy_large(
    writer: IndexWriter, data: memoryview, row: Row, source: int, index: StoredIndex
) -> None:
    _, _, at, num_bytes, sequences, _ = row
    first, begin = LARGE.unpack_from(data, at)
    rest = b""
    for block in _read(source, begin, num_bytes):
        block = rest + block
        whole = len(block) // index.dtype.itemsize * index.dtype.itemsize
        writer.write_tokens(np.frombuffer(block[:whole], index.dtype))
        rest = block[whole:]
    lengths = np.concatenate([*index.lengths(first, first + sequences), np.zeros(0, "<i4")])
    writer.write_documents(lengths, np.array([sequences]))
