"""Files of JSON lines, plain, `.gz` or `.zst`: one object a line, each line accounted for."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron_mlr1.data.inputs import COMPRESSED, Unit, missing_package
from megatron_mlr1.data.texts import BLOCK_BYTES, BadRecordError, Taker, TextBatch
from megatron_mlr1.errors import DataError

READ_BYTES = 2**16
"""Of a compressed file, at a time: what comes of it is held whole, so this is not more."""


class LineNumbers:
    """Numbers of the lines of a file, from a place of it on.

    The lines before the place are counted when a number is first asked for, which is when
    something is wrong.
    """

    def __init__(self, path: Path, begin: int, lines_before: int | None = None) -> None:
        self._path, self._begin = path, begin
        if lines_before is not None:
            self.__dict__["_before"] = lines_before

    @cached_property
    def _before(self) -> int:
        lines, rest = 0, self._begin
        with self._path.open("rb") as file:
            while rest and (block := file.read(min(rest, BLOCK_BYTES))):
                lines, rest = lines + block.count(b"\n"), rest - len(block)
        return lines

    def place(self, first: int, index: int = 0) -> str:
        """Name a line as `file:number`; a file begins with line 1."""
        return f"{self._path}:{self._before + first + index + 1}"


def read_lines(unit: Unit, keys: Sequence[str], skip: int, num_bytes: int) -> Iterator[TextBatch]:
    """Read the lines of a unit, in batches of about `num_bytes` of text.

    Args:
        unit: what to read.
        keys: of the texts of a line.
        skip: bytes of the (decompressed) text of the unit to leave out; the end of a line.
        num_bytes: size of a batch.

    Raises:
        DataError: the file cannot be read, is damaged, or is empty.
        MachineError: reading `.zst` needs a package that is missing.
    """
    path = Path(unit.path)
    first = 0
    numbers = LineNumbers(path, 0)
    try:
        with path.open("rb", buffering=0) as file:
            if path.suffix in COMPRESSED:
                stream, num_rest = _decompressed(path, file), None
                numbers = LineNumbers(path, skip, _skip(stream, skip, path))
            else:
                begin = _line_begin(file, unit.begin) + skip
                num_rest = _line_begin(file, unit.end or 0) - begin
                file.seek(begin)
                stream, numbers = file, LineNumbers(path, begin)
            stored, offset = file.tell(), skip
            for block in _line_blocks(stream, num_rest, num_bytes):
                taker = Taker(keys, partial(numbers.place, first))
                take_lines(block, taker)
                offset += len(block)
                yield taker.close(file.tell() - stored, offset)
                stored, first = file.tell(), first + taker.num_records
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{numbers.place(first)}: cannot be read from here on: {error}. Copy the file again."
        ) from error
    if num_rest is None and offset == 0:
        raise DataError(f"{path} is empty; it needs at least one document. Leave it out.")


def take_lines(block: bytes, taker: Taker) -> None:
    """Parse a block of whole lines.

    A record is what Python's `json` makes of the line, also where the two parsers differ: a number
    may be NaN or Infinity, and of equal keys the last one holds.
    """
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    get = itemgetter(*taker.keys)
    try:
        found = [get(orjson.loads(line)) for line in lines]
        columns = [found] if len(taker.keys) == 1 else [*map(list, zip(*found, strict=True))]
        if all({*map(type, column)} == {str} for column in columns):
            taker.take_all(columns)
            return
    except (ValueError, KeyError, TypeError):
        pass  # one line of these is not like the others: look at each
    for line in lines:
        try:
            taker.take(_parse(line))
        except BadRecordError as reason:
            taker.reject(str(reason), line)


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:
        return _parse_as_python_does(line)


def _parse_as_python_does(line: bytes) -> Any:
    if not line or line.isspace():
        raise BadRecordError("blank line; each line must hold one JSON object. Remove it.")
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRecordError(
            f"byte {error.start + 1} of the line is not UTF-8. Convert the file to UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON: {error}. Mend or remove the line.") from error


def _line_begin(file: io.FileIO, offset: int) -> int:
    """Find the first line that begins at `offset` or after it; the end of the file if none does."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    while piece := file.read(READ_BYTES):
        found = piece.find(b"\n")
        if found >= 0:
            return file.tell() - len(piece) + found + 1
    return file.tell()


def _line_blocks(stream: BinaryIO, num_rest: int | None, num_bytes: int) -> Iterator[bytes]:
    """Cut what is left of a stream, or its next `num_rest` bytes, behind ends of lines."""
    pieces: list[bytes] = []
    while piece := stream.read(num_bytes if num_rest is None else min(num_bytes, num_rest)):
        if num_rest is not None:
            num_rest -= len(piece)
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*pieces, piece[:cut]])
            pieces = []
        pieces.append(piece[cut:])
    if last := b"".join(pieces):
        yield last


def _skip(stream: BinaryIO, num_bytes: int, path: Path) -> int:
    """Read on and count the lines."""
    lines = 0
    while num_bytes:
        block = stream.read(min(num_bytes, BLOCK_BYTES))
        if not block:
            raise DataError(
                f"{path} ends {num_bytes} bytes before the place from which to go on; it is not "
                "the file of the run before. Begin again, or bring that file back."
            )
        lines, num_bytes = lines + block.count(b"\n"), num_bytes - len(block)
    return lines


def _decompressed(path: Path, file: io.FileIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    return io.BufferedReader(_ZstdFile(path, file), READ_BYTES)


@contextmanager
def _damage_as_os_error(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise OSError(str(error)) from error


class _ZstdFile(io.RawIOBase):
    """A `.zst` file of any number of frames; unlike the library's reader it notices a cut one."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise missing_package(error, str(path)) from error
        self._file, self._error = file, zstandard.ZstdError
        # 2**31: frames made with --long=31.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = None
        self._packed = self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 is the end of the file."""
        while not self._ready and self._fill():
            pass
        num = min(len(buffer), len(self._ready))
        buffer[:num], self._ready = self._ready[:num], self._ready[num:]
        return num

    def _fill(self) -> bool:
        packed = self._packed or memoryview(self._file.read(READ_BYTES))
        if not packed:
            if self._frame is not None:
                raise EOFError("the file ends within a frame")
            return False
        if self._frame is None:
            self._frame = self._new_frame()
        with _damage_as_os_error(self._error):
            self._ready = memoryview(self._frame.decompress(packed))
        self._packed = memoryview(b"")
        if self._frame.eof:
            self._packed, self._frame = memoryview(self._frame.unused_data), None
        return True
