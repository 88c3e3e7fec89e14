"""What was found in a corpus, in words and in JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_mlr1.data.index import Corpus
from megatron_mlr1.data.inspection import Finding, benchmark_row, benchmark_totals
from megatron_mlr1.data.overlap import Overlap
from megatron_mlr1.data.statistics import LengthBin, Statistics
from megatron_mlr1.data.tokenizers import Tokenizer

BAR_WIDTH = 40
MOST_ROWS = 20
"""Documents of the benchmarks that are printed; the report has all."""


def as_json(finding: Finding, against: Sequence[Corpus]) -> dict[str, Any]:
    """Put a finding in the words of JSON."""
    record: dict[str, Any] = asdict(finding.statistics)
    record["samples"] = [asdict(sample) for sample in finding.samples]
    if finding.overlap is not None:
        record["overlap"] = {
            "num_documents": finding.overlap.num_documents,
            "num_places": finding.overlap.num_places,
            "against": benchmark_totals(finding.overlap, against),
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
    for total in benchmark_totals(overlap, against):
        lines.append(
            f"    {total['against']}: {total['found']:,} of {total['ngrams']:,} found, in "
            f"{total['documents_found']:,} of {total['documents']:,} documents"
        )
    found = np.flatnonzero(overlap.num_found)
    order = np.argsort(-overlap.num_found[found] / overlap.num_grams[found], kind="stable")
    for at in found[order[:MOST_ROWS]].tolist():
        row = benchmark_row(overlap, at, against)
        lines.append(
            f"    {row['against']} document {row['against_document']}: {row['found']:,} of "
            f"{row['ngrams']:,} ({row['share']:.1%}), first in document {row['first_document']}"
        )
    if found.size > MOST_ROWS:
        lines.append(f"    and {found.size - MOST_ROWS:,} more documents; --report has all")
    return lines
