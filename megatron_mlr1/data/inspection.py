"""Look into corpora: what each holds, samples of it, and the benchmarks that it holds pieces of."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from megatron_mlr1.data.disk import whole_file
from megatron_mlr1.data.index import Corpus, bin_path, idx_path, open_corpus
from megatron_mlr1.data.overlap import ContaminatedDocument, Grams, Overlap, find_overlap
from megatron_mlr1.data.statistics import (
    Sample,
    Statistics,
    decode,
    draw_lengths,
    samples,
    statistics,
)
from megatron_mlr1.data.tokenizers import Tokenizer
from megatron_mlr1.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectionPlan:
    """What to look at."""

    prefixes: tuple[str, ...]
    """Paths of the corpora without .bin and .idx."""
    num_samples: int = 3
    """Documents to decode of each corpus, where there is a tokenizer."""
    seed: int = 0
    """Draws the samples."""
    ngram: int = 13
    """Tokens of a gram that is looked for in the benchmarks."""
    report: Path | None = None
    """Gets all that was found of the benchmarks, as JSON lines."""
    picture: Path | None = None
    """Gets the histograms of the lengths, as PNG."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """All that is said of one corpus."""

    statistics: Statistics
    samples: tuple[Sample, ...]
    overlap: Overlap | None
    warnings: tuple[str, ...]


def inspect(
    plan: InspectionPlan, against: Sequence[Corpus], tokenizer: Tokenizer | None
) -> Iterator[Finding]:
    """Give what is found of each corpus; report and picture are there after the last.

    Raises:
        Mlr1Error: a file or a corpus is not as it must be.
    """
    corpora = [open_corpus(prefix) for prefix in plan.prefixes]
    _refuse_inputs(plan, [*corpora, *against])
    eod = None if tokenizer is None else tokenizer.eod
    grams = Grams(against, plan.ngram, eod) if against else None
    measured = []
    with (
        _new_file(plan.report, "--report") as report,
        _new_file(plan.picture, "--picture") as picture,
    ):
        for corpus in corpora:
            overlap: Overlap | None = None
            warnings: tuple[str, ...] = ()
            measured.append(statistics(corpus))
            shown = samples(corpus, tokenizer, plan.num_samples, plan.seed) if tokenizer else ()
            if grams is not None:
                write = _report_lines(report, corpus, against, tokenizer)
                overlap = _compare(corpus, grams, write)
                _report_benchmarks(report, corpus, against, overlap)
                warnings = _doubts(corpus, against, grams, overlap)
            yield Finding(
                statistics=measured[-1], samples=shown, overlap=overlap, warnings=warnings
            )
        if picture is not None:
            draw_lengths(measured, picture)


def _compare(
    corpus: Corpus, grams: Grams, on_document: Callable[[ContaminatedDocument], None]
) -> Overlap:
    """Find the overlap, with a bar on a terminal."""
    is_hidden = not sys.stderr.isatty()
    with tqdm(total=corpus.num_tokens, unit="tok", unit_scale=True, disable=is_hidden) as bar:
        return find_overlap(corpus, grams, on_document, bar.update)


def _doubts(
    corpus: Corpus, against: Sequence[Corpus], grams: Grams, overlap: Overlap
) -> tuple[str, ...]:
    """Say what lets one doubt that all were made with one tokenizer."""
    said = [
        f"warning: {corpus.prefix} holds {corpus.tokens.dtype} and {other.prefix} "
        f"{other.tokens.dtype}, so their tokenizers have vocabularies of different sizes. "
        "Make both with one tokenizer, or nothing that is found means anything."
        for other in against
        if other.tokens.dtype != corpus.tokens.dtype
    ]
    if not said and grams.largest_token > overlap.largest_token:
        said.append(
            f"warning: the benchmarks hold the token {grams.largest_token} and the largest of "
            f"{corpus.prefix} is {overlap.largest_token}. Check that one tokenizer made both."
        )
    return tuple(said)


@contextmanager
def _new_file(path: Path | None, flag: str) -> Iterator[BinaryIO | None]:
    """Open the file that a flag names, if it names one; see `disk.whole_file`."""
    if path is None:
        yield None
        return
    with whole_file(path, flag) as file:
        yield file


def _refuse_inputs(plan: InspectionPlan, corpora: Sequence[Corpus]) -> None:
    """Refuse to write over what is read, or two files over each other.

    Raises:
        ConfigError: it would be.
    """
    read = {path.resolve() for it in corpora for path in (bin_path(it.prefix), idx_path(it.prefix))}
    for flag, path in (("--report", plan.report), ("--picture", plan.picture)):
        if path is not None and path.resolve() in read:
            raise ConfigError(f"{flag} is {path}, which is read as a corpus. Name another file.")
    if plan.report is not None and plan.report == plan.picture:
        raise ConfigError(f"--report and --picture are both {plan.report}. Name two files.")


def _report_lines(
    report: BinaryIO | None, corpus: Corpus, against: Sequence[Corpus], tokenizer: Tokenizer | None
) -> Callable[[ContaminatedDocument], None]:
    """Make the function that writes a document of the corpus to the report."""

    def write(found: ContaminatedDocument) -> None:
        if report is None:
            return
        record = {
            "kind": "document",
            "corpus": corpus.prefix,
            "document": found.document,
            "tokens": found.num_tokens,
            "overlap": found.num_found,
            "place": found.place,
            "against": against[found.against].prefix,
            "against_document": found.against_document,
            "ngram": found.gram.tolist(),
        }
        if tokenizer:
            record["text"] = decode(tokenizer, found.gram, corpus.prefix)
        report.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    return write


def _report_benchmarks(
    report: BinaryIO | None, corpus: Corpus, against: Sequence[Corpus], overlap: Overlap
) -> None:
    """Write each document of the benchmarks that was found."""
    if report is not None:
        for row in np.flatnonzero(overlap.num_found).tolist():
            record = {
                "kind": "against",
                "corpus": corpus.prefix,
                **benchmark_row(overlap, row, against),
            }
            report.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def benchmark_row(overlap: Overlap, at: int, against: Sequence[Corpus]) -> dict[str, Any]:
    """Say how much of one benchmark document was found, and where first."""
    found, ngrams = int(overlap.num_found[at]), int(overlap.num_grams[at])
    return {
        "against": against[int(overlap.benchmark[at])].prefix,
        "against_document": int(overlap.document[at]),
        "ngrams": ngrams,
        "found": found,
        "share": found / ngrams,
        "first_document": int(overlap.first_document[at]),
    }


def benchmark_totals(overlap: Overlap, against: Sequence[Corpus]) -> list[dict[str, Any]]:
    """Add up what was found of each benchmark."""
    totals = []
    for number, corpus in enumerate(against):
        mine = overlap.benchmark == number
        totals.append(
            {
                "against": corpus.prefix,
                "documents": int(mine.sum()),
                "documents_found": int((overlap.num_found[mine] > 0).sum()),
                "ngrams": int(overlap.num_grams[mine].sum()),
                "found": int(overlap.num_found[mine].sum()),
            }
        )
    return totals
