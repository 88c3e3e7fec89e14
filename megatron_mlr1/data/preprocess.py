"""Records to corpora: reads and tokenizes by `encode`, writes, journals, shuffles, publishes.

The documents of a corpus stand in the order of the input, or in one that a seed and they alone
decide; never does the number of workers. Stopped at any point, the same run goes on and ends with
the same bytes. Memory does not grow with the input.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mlr1.data.disk import names_the_file, refuse_existing, refuse_folders
from megatron_mlr1.data.encode import Position, encode_units
from megatron_mlr1.data.encoding import Encoding
from megatron_mlr1.data.index import (
    Counts,
    IndexWriter,
    bin_path,
    idx_path,
    meta_path,
    partial_paths,
    publish_sealed,
)
from megatron_mlr1.data.jobs import CorpusSummary, Job, PreprocessPlan, summary_of
from megatron_mlr1.data.journal import (
    Journal,
    Phase,
    Stop,
    digest_of,
    goes_on,
    journal_path,
    only_run,
    read_journal,
    refuse_other_plan,
    write_journal,
)
from megatron_mlr1.data.provenance import (
    CorpusRecord,
    record_file,
    record_of,
    write_record,
)
from megatron_mlr1.data.quarantine import Quarantine, publish_rejected, rejected_paths
from megatron_mlr1.data.shuffle import (
    TAIL_FRACTION,
    shuffle_folder,
    shuffle_into,
)
from megatron_mlr1.data.stored_index import open_index
from megatron_mlr1.errors import ConfigError, DataError, MachineError, Mlr1Error


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come, all of it counted, what earlier runs did too."""

    phase: str
    """`encode` or `shuffle`."""
    documents: int
    tokens: int
    """Of all keys."""
    done_bytes: int
    """Of the input as it is stored; in the phase `shuffle`, of tokens in each of two passes."""
    total_bytes: int


OnProgress = Callable[[Progress], None]


def preprocess(
    job: Job, on_progress: OnProgress = lambda progress: None, stop: Stop | None = None
) -> list[CorpusSummary]:
    """Make one corpus of each key, or go on with a stopped run; all appear together, whole.

    Args:
        job: what `prepare` made of a plan.
        on_progress: told after each batch.
        stop: asked after each batch whether to stop.

    Raises:
        StoppedError: `stop` said so; the journal is written, and the same job goes on.
        ConfigError: an output is there, a stopped run of another plan, or one that goes on.
        DataError: a record, a file or an id is wrong; names the first such record.
        MachineError: a file cannot be written, or a worker died.
    """
    plan = job.plan
    with only_run(plan.prefix):
        journal = _begin(job)
        run = _Run(job, on_progress, stop or Stop(), journal)
        try:
            return run.finish()
        except BaseException as error:
            if run.journal.position is None:
                with suppress(MachineError):  # it must not hide why the run ended
                    _remove_unfinished(plan)
            elif isinstance(error, Mlr1Error):
                raise goes_on(error, plan.prefix) from error
            raise


def _begin(job: Job) -> Journal:
    """Read the journal of the same plan, or begin a new one."""
    plan = job.plan
    prefixes = [plan.corpus_prefix(key) for key in plan.encode.json_keys]
    for prefix in prefixes:
        refuse_folders(bin_path(prefix), idx_path(prefix), meta_path(prefix))
        refuse_folders(*partial_paths(prefix), *partial_paths(unshuffled_prefix(prefix)))
    refuse_folders(*rejected_paths(plan.prefix), journal_path(plan.prefix))
    journal = _journal_of(plan)
    if journal is not None:
        try:
            refuse_other_plan(plan.prefix, journal, job.decides)
        except ConfigError:
            if not plan.overwrite:
                raise
            _remove_unfinished(plan, journal.plan.get("keys", ()))
            journal = None
    if journal is None:
        if not plan.overwrite:
            for prefix in prefixes:
                refuse_existing(bin_path(prefix), idx_path(prefix), *partial_paths(prefix))
        _remove_unfinished(plan)
        journal = Journal(plan=job.decides)
        write_journal(plan.prefix, journal)
    return replace(journal, plan=job.decides)


def _journal_of(plan: PreprocessPlan) -> Journal | None:
    """Read the journal of an earlier run; one that cannot be read is none if it may be replaced."""
    try:
        return read_journal(plan.prefix)
    except DataError:
        if not plan.overwrite:
            raise
        return None


class _Run:
    """One run over one journal."""

    def __init__(self, job: Job, on_progress: OnProgress, stop: Stop, journal: Journal) -> None:
        self.journal = journal
        """The last point from which the run can go on."""
        self._job, self._plan = job, job.plan
        self._keys = job.plan.encode.json_keys
        self._dtype = np.dtype(job.tokenizer["dtype"])
        self._on_progress, self._stop = on_progress, stop

    def finish(self) -> list[CorpusSummary]:
        """Do what is left of all phases."""
        if self.journal.phase == "encode":
            self._encode()
        if self.journal.phase == "shuffle":
            self._shuffle()
        return self._publish()

    def _staging(self, key: str) -> str:
        """Name what the tokens are written to: the corpus itself, or the source of a shuffle."""
        prefix = self._plan.corpus_prefix(key)
        return prefix if self._plan.shuffle_seed is None else unshuffled_prefix(prefix)

    def _encode(self) -> None:
        plan = self._plan
        with ExitStack() as stack:
            writers = {}
            for key in self._keys:
                writers[key] = IndexWriter(
                    self._staging(key),
                    self._dtype,
                    resume=self.journal.counts.get(key, Counts()),
                    hashed=plan.shuffle_seed is None,
                )
                stack.callback(writers[key].suspend)
            quarantine = Quarantine(plan.prefix, self.journal.rejected_bytes)
            stack.callback(quarantine.close)
            encoding = Encoding(plan.prefix, self.journal, writers, quarantine)
            try:
                self._read_all(encoding)
                final = encoding.seal()
            finally:
                encoding.close()
                self.journal = encoding.journaled
            records = {
                key: self._record(key, writer, final)
                for key, writer in writers.items()
                if writer.sha256
            }
        phase: Phase = "publish" if plan.shuffle_seed is None else "shuffle"
        self._write(replace(final, phase=phase, corpora=records))

    def _read_all(self, encoding: Encoding) -> None:
        every_bytes, every_s = self._plan.journal_bytes, self._plan.journal_s
        start = encoding.now.position
        batches = encode_units(
            self._plan.encode, self._job.units, None if start is None else Position(**start)
        )
        self._on_progress(self._progress(encoding.now))
        try:
            with closing(batches):
                for batch in batches:
                    encoding.accept(batch)
                    self._on_progress(self._progress(encoding.now))
                    if self._stop.number is not None or encoding.is_due(every_bytes, every_s):
                        encoding.write_journal()
                    self._stop.obey()
        except Mlr1Error:
            self._stop.obey()  # the signal may have ended the workers before it came here
            raise

    def _progress(self, now: Journal) -> Progress:
        counts = now.counts.values()
        return Progress(
            phase="encode",
            documents=now.records - now.rejected,
            tokens=sum(count.tokens for count in counts),
            done_bytes=now.stored_bytes,
            total_bytes=self._job.total_bytes,
        )

    def _shuffle(self) -> None:
        plan = self._plan
        assert plan.shuffle_seed is not None, "only a plan with a seed has this phase"
        records = {}
        counts = self.journal.counts.values()
        total = 2 * self._dtype.itemsize * sum(count.tokens for count in counts)
        state = Progress("shuffle", 0, sum(count.tokens for count in counts), 0, total)

        def tell(num_bytes: int) -> None:
            nonlocal state
            state = replace(state, done_bytes=state.done_bytes + num_bytes)
            self._on_progress(state)
            self._stop.obey()

        for key in self._keys:
            publish_sealed(self._staging(key))
            prefix = plan.corpus_prefix(key)
            writer = IndexWriter(prefix, self._dtype, overwrite=True, hashed=True)
            with ExitStack() as stack:
                stack.callback(writer.suspend)
                source = open_index(self._staging(key))
                shuffle_into(writer, source, plan.shuffle_seed, shuffle_folder(prefix), tell)
                writer.seal()
            records[key] = self._record(key, writer, self.journal)
        self._write(replace(self.journal, phase="publish", corpora=records))

    def _record(self, key: str, writer: IndexWriter, journal: Journal) -> dict[str, Any]:
        tokens, _, _, index = partial_paths(writer.prefix)
        encode = self._plan.encode
        shuffled = self._plan.shuffle_seed
        counts = writer.counts
        record = CorpusRecord(
            kind="documents",
            files={
                "bin": record_file(tokens, writer.sha256["bin"]),
                "idx": record_file(index, writer.sha256["idx"]),
            },
            tokenizer={**self._job.tokenizer, "engine": journal.engine},
            append_eod=encode.append_eod,
            vocab_size=encode.vocab_size or self._job.tokenizer["vocab_size"],
            dtype=self._dtype.name,
            documents=counts.documents,
            sequences=counts.sequences,
            tokens=counts.tokens,
            rejected=journal.rejected,
            inputs=self._job.decides["inputs"],
            shard=self._plan.shard,
            plan=digest_of(self._job.decides),
            shuffled=shuffled,
            tail_fraction=None if shuffled is None else TAIL_FRACTION,
            extra={"json_key": key},
        )
        return asdict(record)

    def _publish(self) -> list[CorpusSummary]:
        found = []
        for key in self._keys:
            prefix = self._plan.corpus_prefix(key)
            publish_sealed(prefix)
            record = record_of(self.journal.corpora[key])
            write_record(prefix, record)
            found.append(summary_of(prefix, record))
        publish_rejected(self._plan.prefix)
        _remove_unfinished(self._plan)
        return found

    def _write(self, journal: Journal) -> None:
        write_journal(self._plan.prefix, journal)
        self.journal = journal


def unshuffled_prefix(prefix: str) -> str:
    """Name the corpus in the order of the input, from which `prefix` is shuffled."""
    return f"{prefix}.unshuffled"


def _remove_unfinished(plan: PreprocessPlan, keys: Sequence[str] = ()) -> None:
    """Remove all that a run leaves but finished corpora, of other keys too; the journal last.

    Raises:
        MachineError: something cannot be removed.
    """
    files: list[Path] = []
    for key in {*plan.encode.json_keys, *keys}:
        prefix = plan.corpus_prefix(key)
        source = unshuffled_prefix(prefix)
        shutil.rmtree(shuffle_folder(prefix), ignore_errors=True)
        own = bin_path(source), idx_path(source)
        files += (*partial_paths(prefix), *partial_paths(source), *own)
    for path in (*files, rejected_paths(plan.prefix)[1], journal_path(plan.prefix)):
        with names_the_file(path):
            path.unlink(missing_ok=True)
