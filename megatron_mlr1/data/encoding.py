"""Encoded batches to unfinished corpora and their journal; counts what goes in and comes out."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace

from megatron_mlr1.data.encode import EncodedBatch
from megatron_mlr1.data.index import IndexWriter
from megatron_mlr1.data.journal import Journal, write_journal
from megatron_mlr1.data.quarantine import Quarantine
from megatron_mlr1.errors import DataError, MachineError


class Encoding:
    """The writers of a run under one journal; the disk is waited for in a thread."""

    def __init__(
        self,
        prefix: str,
        journal: Journal,
        writers: Mapping[str, IndexWriter],
        quarantine: Quarantine,
    ) -> None:
        """Go on from `journal`, to which the writers and the quarantine are open."""
        self.now = journal
        """Where the run is."""
        self.journaled = journal
        """The last point that lies on the disk."""
        self._prefix, self._writers, self._quarantine = prefix, writers, quarantine
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[Journal, Future[None]] | None = None
        self._last_s, self._last_bytes = time.monotonic(), self._num_bytes()

    def accept(self, batch: EncodedBatch) -> None:
        """Write a batch.

        Raises:
            DataError: it has not a document for each record that was not rejected.
            MachineError: the disk is full or failed.
        """
        for block in batch.blocks.values():
            _refuse_difference(batch.num_records, block.sequences.size, len(batch.rejected))
        for key, writer in self._writers.items():
            writer.write(batch.blocks[key])
        self._quarantine.write(batch.rejected)
        self.now = replace(
            self.now,
            position=asdict(batch.end),
            counts={key: writer.counts for key, writer in self._writers.items()},
            records=self.now.records + batch.num_records,
            rejected=self.now.rejected + len(batch.rejected),
            rejected_bytes=self._quarantine.num_bytes,
            stored_bytes=self.now.stored_bytes + batch.stored_bytes,
            engine=batch.engine,
        )

    def is_due(self, every_bytes: int, every_s: float) -> bool:
        """Tell whether so many bytes were written, or so many seconds went by, since the last."""
        return (
            self._num_bytes() - self._last_bytes >= every_bytes
            or time.monotonic() - self._last_s >= every_s
        )

    def write_journal(self) -> None:
        """Begin to force all to the disk and to journal it; waits for the one before.

        Raises:
            MachineError: the disk is full or failed.
        """
        self.wait()
        for writer in self._writers.values():
            writer.flush()
        self._quarantine.flush()
        self._pending = self.now, self._thread.submit(self._sync, self.now)
        self._last_s, self._last_bytes = time.monotonic(), self._num_bytes()

    def wait(self) -> None:
        """Wait for the journal that is under way.

        Raises:
            MachineError: the disk is full or failed.
        """
        if self._pending is not None:
            journal, future = self._pending
            self._pending = None
            future.result()
            self.journaled = journal

    def seal(self) -> Journal:
        """Put the indices together and force all to the disk; the journal is for the caller.

        Raises:
            DataError: documents are missing, or a corpus holds no tokens.
            MachineError: the disk is full or failed.
        """
        self.wait()
        if self.now.records == self.now.rejected:
            self.journaled = replace(self.journaled, position=None)
            raise DataError(
                f"All {self.now.records} records of the input were rejected; a corpus needs "
                "documents. Leave --on-error skip out to see what is wrong with the first."
            )
        for key, writer in self._writers.items():
            _refuse_difference(self.now.records, writer.num_documents, self.now.rejected)
            if writer.num_tokens == 0:
                # Nothing of this is worth to be kept.
                self.journaled = replace(self.journaled, position=None)
                raise DataError(
                    f"{key!r} is empty in all {writer.num_documents} documents; a corpus needs "
                    "tokens. Leave the key out of --json-keys, or mend the input."
                )
        for writer in self._writers.values():
            writer.seal()
        self._quarantine.flush()
        return self.now

    def close(self) -> None:
        """End the thread; what it was about counts where it was done."""
        with suppress(MachineError):
            self.wait()
        self._thread.shutdown()

    def _sync(self, journal: Journal) -> None:
        for writer in self._writers.values():
            writer.sync()
        write_journal(self._prefix, journal)

    def _num_bytes(self) -> int:
        return sum(writer.num_bytes for writer in self._writers.values())


def _refuse_difference(records: int, documents: int, rejected: int) -> None:
    if records != documents + rejected:
        raise DataError(
            f"{records} records were read, but {documents} documents and {rejected} rejected ones "
            "came out, so some would be lost. Nothing was published. This is a fault of the "
            "program: report it with the input."
        )
