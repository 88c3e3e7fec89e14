"""`PREFIX.meta.json`: how a corpus was made and what its files must be; training holds it to that.

The record is the last file of a corpus to appear. A corpus without one is older or foreign and
stays usable. Sizes and the ends of the files are compared in milliseconds, whole files on demand.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mlr1 import __version__
from megatron_mlr1.data.disk import names_the_file, write_json
from megatron_mlr1.data.index import meta_path
from megatron_mlr1.errors import ConfigError, DataError

FORMAT = 1
EDGE_BYTES = 1 << 16
Kind = Literal["documents", "packs"]
Level = Literal["quick", "full"]
ENDS = {"bin", "idx", "loss.bin"}
"""How the names of a corpus's files end; the last is of packs."""
KINDS: Mapping[str, type] = {
    **{"files": dict, "tokenizer": dict, "inputs": list, "dtype": str, "vocab_size": int},
    **dict.fromkeys(("documents", "sequences", "tokens", "rejected"), int),
}
"""What of a record must be what; programs compute with these."""
DECIDES_IDS = ("type", "sha256", "vocab_size", "eod", "options")
"""What of a tokenizer's description decides the ids; the rest says where it came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What one file of a corpus must be."""

    bytes: int
    edges: str
    """SHA-256 of the size (decimal digits), the first and the last 64 KiB, in hexadecimal."""
    sha256: str
    """Of the whole file, in hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusRecord:
    """How a corpus was made, and what it holds."""

    kind: Kind
    """Documents as `tools/preprocess_data.py` writes them, or packed samples for fine-tuning."""
    files: Mapping[str, FileRecord]
    """By the end of the name: `bin`, `idx` and whatever else the kind has."""
    tokenizer: Mapping[str, Any]
    """As `encode.describe_tokenizer` describes it, with `options`: the flags that change ids."""
    append_eod: bool
    vocab_size: int
    """Ids are smaller."""
    dtype: str
    """Type of a token, as NumPy names it."""
    documents: int
    sequences: int
    tokens: int
    rejected: int = 0
    """Records of the input that were left out."""
    inputs: Sequence[Mapping[str, Any]] = ()
    """Fingerprints of what was read, in order."""
    shard: tuple[int, int] | None = None
    """(i, n): the i-th of n parts of a longer run; None: all of it."""
    plan: str | None = None
    """Digest of all that decided the bytes; None where no single run did."""
    shuffled: int | None = None
    """Seed of the global shuffle of the documents; None: they stand in the order of the input."""
    tail_fraction: float | None = None
    """Share of the content hashes whose documents stand last, ordered by hash; see `shuffle`."""
    part_of: Mapping[str, Any] | None = None
    """Where a split made it: `sha256` of the whole's tokens, `first_document`."""
    pack_length: int | None = None
    """Packs only: tokens of a pack."""
    trained_tokens: int | None = None
    """Packs only: tokens that the loss counts."""
    extra: Mapping[str, Any] | None = None
    """What else a maker of corpora notes; never interpreted here."""
    program: str = __version__
    format: int = FORMAT

    @property
    def edges(self) -> str:
        """One digest over the sizes and the ends of all files: equal where the files are."""
        parts = (f"{end}:{self.files[end].edges}" for end in sorted(self.files))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def record_file(path: Path, sha256: str | None = None) -> FileRecord:
    """Describe a file; reads all of it unless its SHA-256 is known.

    Raises:
        DataError: it cannot be read.
    """
    num_bytes, edges = _edges(path)
    return FileRecord(bytes=num_bytes, edges=edges, sha256=sha256 or _sha256(path))


def record_files(prefix: str, ends: Sequence[str] = ("bin", "idx")) -> dict[str, FileRecord]:
    """Describe the files `PREFIX.END` of a corpus by reading them.

    Raises:
        DataError: one cannot be read.
    """
    return {end: record_file(Path(f"{prefix}.{end}")) for end in ends}


def write_record(prefix: str, record: CorpusRecord) -> None:
    """Write the record of a corpus, last of all its files; it appears by a rename.

    Raises:
        MachineError: the disk is full or failed.
    """
    write_json(meta_path(prefix), asdict(record))


def read_record(prefix: str) -> CorpusRecord | None:
    """Read the record of a corpus; None: it has none.

    Raises:
        DataError: there is one that cannot be read or is of another format.
    """
    path = meta_path(prefix)
    if not path.exists():
        return None
    with names_the_file(path, DataError):
        data = path.read_bytes()
    try:
        return record_of(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is no record of a corpus that this version knows ({error}). Make the corpus "
            "again, or remove the file: a corpus without a record is used as it is."
        ) from error


def record_of(fields: Mapping[str, Any]) -> CorpusRecord:
    """Build a record of what JSON holds of it.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it holds no such thing.
    """
    if fields["format"] != FORMAT:
        raise ValueError(f"its format is {fields['format']}, known is {FORMAT}")
    if fields["kind"] not in ("documents", "packs"):
        raise ValueError(f"its kind is {fields['kind']!r}")
    for name, kind in KINDS.items():
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise TypeError(f"its {name} is {fields[name]!r}")
    if not {"bin", "idx"} <= set(fields["files"]) <= ENDS:
        raise ValueError(f"its files are {', '.join(fields['files']) or 'none'}")
    files = {end: FileRecord(**parts) for end, parts in fields["files"].items()}
    shard = fields["shard"]
    return CorpusRecord(
        **(dict(fields) | {"files": files, "shard": None if shard is None else tuple(shard)})
    )


def verify(prefix: str, record: CorpusRecord, level: Level) -> None:
    """Compare the files of a corpus with its record.

    Args:
        prefix: the corpus.
        record: what `read_record` gave.
        level: `quick` reads sizes and the ends of the files, `full` every byte.

    Raises:
        DataError: a file is missing or differs; names it and what differs.
    """
    for end, must_be in record.files.items():
        path = Path(f"{prefix}.{end}")
        num_bytes, edges = _edges(path)
        if num_bytes != must_be.bytes:
            raise _differs(path, f"has {num_bytes} bytes where its record says {must_be.bytes}")
        if edges != must_be.edges:
            raise _differs(path, "has other bytes at its begin or end than its record says")
        if level == "full" and (found := _sha256(path)) != must_be.sha256:
            raise _differs(path, f"has the SHA-256 {found} where its record says {must_be.sha256}")


def refuse_packs(prefix: str, record: CorpusRecord | None, program: str) -> None:
    """Refuse a corpus of packs where documents are moved, joined or cut.

    Raises:
        ConfigError: the corpus is one of packs.
    """
    if record is not None and record.kind == "packs":
        raise ConfigError(
            f"{prefix} holds packed samples, whose loss masks lie in files of their own, and "
            f"{program} moves documents alone. Pack the chats again with what it should hold."
        )


def decides_ids(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Take of a tokenizer's description what decides the ids."""
    return {key: tokenizer.get(key) for key in DECIDES_IDS}


def _differs(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} {what}: it is not the file that was written. Copy the corpus again, or make it "
        "again with the program that made it."
    )


def _edges(path: Path) -> tuple[int, str]:
    with names_the_file(path, DataError), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return size, digest.hexdigest()


def _sha256(path: Path) -> str:
    with names_the_file(path, DataError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
