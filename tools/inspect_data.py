#!/usr/bin/env python
"""Show what corpora hold, and which benchmarks they hold pieces of."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from megatron_mlr1.data.index import Corpus, open_corpus
from megatron_mlr1.data.overlap import ContaminatedDocument, Grams, Overlap, find_overlap
from megatron_mlr1.data.statistics import (
    LengthBin,
    Sample,
    Statistics,
    decode,
    draw_lengths,
    samples,
    statistics,
)
from megatron_mlr1.data.tokenizers import LOADERS, Tokenizer, TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import MachineError, Mlr1Error

BAR_WIDTH = 40
MOST_ROWS = 20
"""Documents of the benchmarks that are printed; the report has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """All that is said of one corpus."""

    statistics: Statistics
    samples: tuple[Sample, ...]
    overlap: Overlap | None
    warnings: tuple[str, ...]


def read_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("corpora", nargs="+", metavar="PREFIX", help="corpus PREFIX.bin and .idx")
    parser.add_argument("--json", action="store_true", help="print one JSON object a corpus")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the lengths")
    group = parser.add_argument_group("samples")
    group.add_argument("--tokenizer-type", choices=list(LOADERS))
    group.add_argument("--tokenizer-model", help="folder, hub name, or SentencePiece .model file")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument(
        "--samples", type=int, default=3, help="documents to decode with the tokenizer (default 3)"
    )
    group.add_argument("--seed", type=int, default=0, help="draws the samples (default 0)")
    group = parser.add_argument_group("overlap with benchmarks")
    group.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="corpora of the benchmarks, made with the same tokenizer",
    )
    group.add_argument("--ngram", type=int, default=13, help="tokens of a gram (default 13)")
    group.add_argument("--report", type=Path, metavar="FILE.jsonl", help="all that was found")
    args = parser.parse_args(words)
    if args.report and not args.against:
        parser.error("--report holds the overlap with benchmarks; name them with --against")
    if args.tokenizer_model and not args.tokenizer_type:
        parser.error("--tokenizer-model is given; say its kind with --tokenizer-type")
    if args.samples < 0 or args.seed < 0:
        parser.error("--samples and --seed are at least 0")
    return args


def main(words: Sequence[str] | None = None) -> None:
    """Inspect the corpora and print what was found."""
    args = read_words(words)
    try:
        tokenizer = read_tokenizer(args)
        against = [open_corpus(prefix) for prefix in args.against]
        for finding in inspect(args, against, tokenizer):
            if args.json:
                print(json.dumps(as_json(finding, against), ensure_ascii=False), flush=True)
            else:
                print(as_text(finding, tokenizer, against, args.ngram), flush=True)
            for warning in finding.warnings:
                print(warning, file=sys.stderr)
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def read_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """Load the tokenizer, where one is named."""
    if args.tokenizer_type is None:
        return None
    return load_tokenizer(
        TokenizerPlan(
            tokenizer_type=args.tokenizer_type,
            tokenizer_model=args.tokenizer_model,
            trust_remote_code=args.trust_remote_code,
        )
    )


def inspect(
    args: argparse.Namespace, against: Sequence[Corpus], tokenizer: Tokenizer | None
) -> Iterator[Finding]:
    """Give what is found of each corpus; report and picture are there after the last.

    Raises:
        Mlr1Error: a file or a corpus is not as it must be.
    """
    corpora = [open_corpus(prefix) for prefix in args.corpora]
    eod = None if tokenizer is None else tokenizer.eod
    grams = Grams(against, args.ngram, eod) if against else None
    measured = []
    with new_file(args.report) as report, new_file(args.picture) as picture:
        for corpus in corpora:
            overlap: Overlap | None = None
            warnings: tuple[str, ...] = ()
            measured.append(statistics(corpus))
            shown = samples(corpus, tokenizer, args.samples, args.seed) if tokenizer else ()
            if grams is not None:
                write = report_lines(report, corpus, against, tokenizer)
                overlap = compare(corpus, grams, write)
                report_benchmarks(report, corpus, against, overlap)
                warnings = doubts(corpus, against, grams, overlap)
            yield Finding(
                statistics=measured[-1], samples=shown, overlap=overlap, warnings=warnings
            )
        if picture is not None:
            draw_lengths(measured, picture)


def compare(
    corpus: Corpus, grams: Grams, on_document: Callable[[ContaminatedDocument], None]
) -> Overlap:
    """Find the overlap, with a bar on a terminal."""
    is_hidden = not sys.stderr.isatty()
    with tqdm(total=corpus.num_tokens, unit="tok", unit_scale=True, disable=is_hidden) as bar:
        return find_overlap(corpus, grams, on_document, bar.update)


def doubts(
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
def new_file(path: Path | None) -> Iterator[BinaryIO | None]:
    """Open a file that gets its name when all of it is written, over one that is there.

    Raises:
        MachineError: the folder is missing or cannot be written, or the disk is full.
    """
    if path is None:
        yield None
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise MachineError(
            f"{partial}: {error.strerror}. It needs a folder that is there, may be written and "
            "has room; mend that and run again."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def report_lines(
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


def report_benchmarks(
    report: BinaryIO | None, corpus: Corpus, against: Sequence[Corpus], overlap: Overlap
) -> None:
    """Write each document of the benchmarks that was found."""
    if report is not None:
        for row in np.flatnonzero(overlap.num_found).tolist():
            record = {"kind": "against", "corpus": corpus.prefix, **_row(overlap, row, against)}
            report.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def as_json(finding: Finding, against: Sequence[Corpus]) -> dict[str, Any]:
    """Put a finding in the words of JSON."""
    record: dict[str, Any] = asdict(finding.statistics)
    record["samples"] = [asdict(sample) for sample in finding.samples]
    if finding.overlap is not None:
        record["overlap"] = {
            "num_documents": finding.overlap.num_documents,
            "num_places": finding.overlap.num_places,
            "against": _totals(finding.overlap, against),
        }
        record["warnings"] = finding.warnings
    return record


def as_text(
    finding: Finding, tokenizer: Tokenizer | None, against: Sequence[Corpus], n: int
) -> str:
    """Put a finding in the lines that are printed."""
    it = finding.statistics
    percent = it.largest_percent_share
    lines = [
        it.prefix,
        f"  documents  {it.num_documents:,} ({it.num_empty:,} without tokens), "
        f"{it.num_sequences:,} sequences",
        f"  tokens     {it.num_tokens:,} ({it.dtype}), {it.num_bytes:,} bytes in both files",
        f"  length     mean {it.mean_length:,.1f}, median {it.median_length:,}, "
        f"99 % up to {it.p99_length:,}, longest {it.longest_length:,} "
        f"(document {it.longest_document})",
        f"             the longest 1 % of the documents have {percent:.1%} of the tokens",
        f"  last token {_ending(it, tokenizer)}",
        "",
        *_bars(it.histogram, it.num_documents),
    ]
    for sample in finding.samples:
        lines += ["", f"  document {sample.document}, {sample.num_tokens:,} tokens"]
        lines += [f"    {line}" for line in (sample.beginning or "(empty)").splitlines()]
        if sample.ending is not None:
            lines += ["    [...]", *(f"    {line}" for line in sample.ending.splitlines())]
    if finding.overlap is not None:
        lines += ["", *_overlap_lines(finding.overlap, it.num_documents, against, n)]
    return "\n".join([*lines, ""])


def _ending(it: Statistics, tokenizer: Tokenizer | None) -> str:
    if it.last_token is None:
        return "none, all documents are empty"
    said = f"{it.last_token} ends {it.last_token_share:.1%} of {it.num_ends_read:,} documents"
    if tokenizer is None:
        return said
    is_eod = "it is" if tokenizer.eod == it.last_token else f"not {tokenizer.eod},"
    return f"{said}; {is_eod} the tokenizer's end of document"


def _bars(histogram: Sequence[LengthBin], num_documents: int) -> list[str]:
    most = max(part.num_documents for part in histogram)
    names = [_lengths(part) for part in histogram]
    wide = max(map(len, [*names, "tokens"]))
    lines = [f"  {'tokens':>{wide}}  {'documents':>15}"]
    for name, part in zip(names, histogram, strict=True):
        # A bar for the few as well, so that they are not taken for none.
        size = -(-part.num_documents * BAR_WIDTH // most)
        share = part.num_documents / num_documents
        lines.append(f"  {name:>{wide}}  {part.num_documents:>15,} {share:>6.1%}  {'#' * size}")
    return [line.rstrip() for line in lines]


def _lengths(part: LengthBin) -> str:
    last = part.end - 1
    return f"{part.begin:,}" if last == part.begin else f"{part.begin:,}-{last:,}"


def _overlap_lines(
    overlap: Overlap, num_documents: int, against: Sequence[Corpus], n: int
) -> list[str]:
    share = overlap.num_documents / num_documents
    lines = [
        f"  {n}-grams of the benchmarks: {overlap.num_documents:,} documents ({share:.3%}) hold "
        f"some, at {overlap.num_places:,} places",
    ]
    for total in _totals(overlap, against):
        lines.append(
            f"    {total['against']}: {total['found']:,} of {total['ngrams']:,} found, in "
            f"{total['documents_found']:,} of {total['documents']:,} documents"
        )
    found = np.flatnonzero(overlap.num_found)
    order = np.argsort(-overlap.num_found[found] / overlap.num_grams[found], kind="stable")
    for at in found[order[:MOST_ROWS]].tolist():
        row = _row(overlap, at, against)
        lines.append(
            f"    {row['against']} document {row['against_document']}: {row['found']:,} of "
            f"{row['ngrams']:,} ({row['share']:.1%}), first in document {row['first_document']}"
        )
    if found.size > MOST_ROWS:
        lines.append(f"    and {found.size - MOST_ROWS:,} more documents; --report has all")
    return lines


def _row(overlap: Overlap, at: int, against: Sequence[Corpus]) -> dict[str, Any]:
    found, ngrams = int(overlap.num_found[at]), int(overlap.num_grams[at])
    return {
        "against": against[int(overlap.benchmark[at])].prefix,
        "against_document": int(overlap.document[at]),
        "ngrams": ngrams,
        "found": found,
        "share": found / ngrams,
        "first_document": int(overlap.first_document[at]),
    }


def _totals(overlap: Overlap, against: Sequence[Corpus]) -> list[dict[str, Any]]:
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


if __name__ == "__main__":
    main()
