"""Which files a corpus is made of, in which order, and which part of them one machine takes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from megatron_mlr1.errors import ConfigError, DataError, MachineError

COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".json", ".ndjson")
HUB = "hf://"
FINGERPRINT_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of one input that is read from begin to end."""

    path: str
    """The file as it was found, or the `hf://` name of a data set on the hub."""
    kind: str
    """`jsonl`, `parquet`, `arrow` or `hub`."""
    begin: int
    """First byte of a plain JSON-lines file (a line belongs to the unit in which it begins), first
    row group of a Parquet file, first record batch of an Arrow file, own number of a hub shard."""
    end: int | None
    """The byte, row group or record batch after it, None for the end of the file; the number of
    shards of the hub. Compressed files are not cut."""
    stored_bytes: int
    """Its part of the file, in bytes as stored; 0 for the hub, where it is not known."""


def find_units(inputs: Sequence[str], shard: tuple[int, int] = (0, 1)) -> list[Unit]:
    """Find what to read; `shard` (i, n) takes the i-th of n contiguous parts by stored bytes.

    Corpora made of shards 0 to n - 1, merged in this order, have the bytes of one run over all.

    Args:
        inputs: files, folders (all files of known endings below them, by name), patterns, folders
            of `datasets.save_to_disk`, or `hf://org/name[:config][:split]`. Kept in this order.
        shard: number of this part, and the number of parts.

    Raises:
        ConfigError: an input is named twice, or this shard gets nothing.
        DataError: there is no such file, its ending is not known, or it is empty or damaged.
        MachineError: cutting a file needs a package that is missing.
    """
    whole = [unit for name in inputs for unit in _whole_units(name)]
    _refuse_the_same_twice(whole)
    number, parts = shard
    if not 0 <= number < parts:
        raise ConfigError(
            f"--shard is {number}/{parts}; it is i/n with i from 0 to n - 1. Mend it."
        )
    if parts == 1:
        return whole
    if any(unit.kind == "hub" for unit in whole):
        if len(whole) > 1:
            raise ConfigError(
                "--shard cuts one hub data set or any number of files, and here are both, or "
                "several hub data sets. Preprocess each on its own."
            )
        return [replace(whole[0], begin=number, end=parts)]
    units = list(_part(whole, number, parts))
    if not units:
        raise ConfigError(
            f"--shard {number}/{parts} gets none of the {len(whole)} input files; compressed "
            "files, row groups and record batches are not cut. Use fewer shards."
        )
    return units


def fingerprint(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Describe each input so that another one is noticed; JSON-able, in the order of the units.

    Returns:
        For each unit: `path`, `begin`, `end`, `bytes` of the whole file, and `sha256` of its size
        and its first and last 64 KiB. For the hub: `path`, `begin`, `end` alone.

    Raises:
        DataError: a file cannot be read.
    """
    found = []
    for unit in units:
        entry: dict[str, Any] = {"path": unit.path, "begin": unit.begin, "end": unit.end}
        if unit.kind != "hub":
            entry |= _digest(Path(unit.path))
        found.append(entry)
    return found


def _digest(path: Path) -> dict[str, Any]:
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode() + file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise DataError(
            f"{where}: cannot be read: {error.strerror}. Mend that, or name other input."
        ) from error


def _whole_units(name: str) -> Iterator[Unit]:
    if name.startswith(HUB):
        yield Unit(name, "hub", 0, 1, 0)
        return
    if not name:
        raise ConfigError("An --input is '', which names nothing. For this folder say ./ instead.")
    path = Path(name)
    with _reading(path):
        found = [path] if path.exists() else sorted(map(Path, glob(name, recursive=True)))
        files = [file for entry in found for file in _files(entry)]
    if not files:
        raise DataError(
            f"{name}: no such file, or a folder without files of known endings "
            f"({', '.join(_known_endings())}). Give a file, a folder, or a pattern in quotes."
        )
    for file in files:
        with _reading(file):
            kind, size = _kind(file), file.stat().st_size
        if size == 0:
            raise DataError(f"{file} is empty; it needs at least one document. Leave it out.")
        is_cut_by_bytes = kind == "jsonl" and file.suffix not in COMPRESSED
        yield Unit(str(file), kind, 0, size if is_cut_by_bytes else None, size)


def _files(entry: Path) -> Iterator[Path]:
    if not entry.is_dir():
        yield entry
    elif (entry / "dataset_dict.json").is_file():
        splits = _names_in(entry / "dataset_dict.json", lambda found: found["splits"])
        raise DataError(
            f"{entry} holds the splits {', '.join(splits)}; a corpus is made of one. "
            f"Name one, such as {entry / splits[0]}."
        )
    elif (entry / "state.json").is_file() and (entry / "dataset_info.json").is_file():
        names = _names_in(
            entry / "state.json", lambda found: [file["filename"] for file in found["_data_files"]]
        )
        yield from (entry / name for name in names)
    else:
        for inner in sorted(entry.iterdir()):
            if inner.is_dir() or inner.name.endswith(_known_endings()):
                yield from _files(inner)


def _names_in(path: Path, of: Callable[[Any], Sequence[Any]]) -> Sequence[str]:
    """Read the names that a file of `datasets` lists.

    Raises:
        DataError: it lists none.
    """
    try:
        names = of(json.loads(path.read_bytes()))
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError("it lists no names")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{path} is not what `datasets` writes ({type(error).__name__}: {error}). Save the "
            "data set again."
        ) from error
    return names


def _kind(path: Path) -> str:
    if path.name.endswith(_json_endings()):
        return "jsonl"
    if path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    raise DataError(
        f"{path}: the ending is none of {', '.join(_known_endings())}, and it tells the format. "
        "Rename the file, or convert it."
    )


def _json_endings() -> tuple[str, ...]:
    return tuple(plain + packed for plain in JSON_LINES for packed in ("", *COMPRESSED))


def _known_endings() -> tuple[str, ...]:
    return (*_json_endings(), ".parquet", ".arrow")


def _refuse_the_same_twice(units: Sequence[Unit]) -> None:
    seen: set[str] = set()
    for unit in units:
        real = unit.path if unit.kind == "hub" else os.path.realpath(unit.path)
        if real in seen:
            raise ConfigError(
                f"{unit.path} is among the inputs twice; each document is read once. Name it once, "
                "or repeat the corpus in the mixture of the training."
            )
        seen.add(real)


def _part(whole: Sequence[Unit], number: int, parts: int) -> Iterator[Unit]:
    """Cut what lies in the part; what cannot be cut belongs where its middle lies."""
    total = sum(unit.stored_bytes for unit in whole)
    low, high = total * number // parts, total * (number + 1) // parts
    at = 0
    for unit in whole:
        end = at + unit.stored_bytes
        if low <= at and end <= high:
            yield unit
        elif unit.kind == "jsonl" and unit.end is not None:
            first, last = max(low, at) - at, min(high, end) - at
            if first < last:
                yield replace(unit, begin=first, end=last, stored_bytes=last - first)
        elif at < high and low < end:
            yield from _pieces(unit, low - at, high - at)
        at = end


def _pieces(unit: Unit, low: int, high: int) -> Iterator[Unit]:
    """Take the pieces of one file whose middles lie between two places of the file."""
    sizes = _piece_sizes(unit)
    total, before, taken = sum(sizes), 0, []
    for index, size in enumerate(sizes):
        middle = (2 * before + size) * unit.stored_bytes // (2 * total)
        if low <= middle < high:
            taken.append(index)
        before += size
    if taken:
        begin, end = taken[0], taken[-1] + 1
        share = unit.stored_bytes * sum(sizes[begin:end]) // total
        is_whole = len(taken) == len(sizes)
        yield unit if is_whole else replace(unit, begin=begin, end=end, stored_bytes=share)


def _piece_sizes(unit: Unit) -> list[int]:
    if unit.kind == "jsonl":
        return [1]
    try:
        from megatron_mlr1.data.columns import piece_sizes
    except ImportError as error:
        raise missing_package(error, unit.path) from error
    return piece_sizes(unit)


def missing_package(error: ImportError, what: str) -> MachineError:
    """Say which package is missing for what, and how to get it."""
    return MachineError(
        f"{what} needs the Python package {error.name}, which is not here. "
        "Install it: pip install 'megatron_mlr1[data]'."
    )
