#!/usr/bin/env python
"""Make corpora (.bin/.idx) of records; takes the flags of Megatron-LM's tool of this name.

A run that was stopped or killed goes on when the same command is given again, and ends with the
same bytes. Nothing has its final name before all of it is whole.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_mlr1.ending import clean_exit

# The rest is imported where it is needed: each process that tokenizes begins with importing this.
if TYPE_CHECKING:
    from megatron_mlr1.data.jobs import CorpusSummary, Job, PreprocessPlan
    from megatron_mlr1.data.journal import Stop
    from megatron_mlr1.data.preprocess import Progress

NOT_HERE = {
    "--split-sentences": "documents are not split; give a list of sentences as the text instead",
    "--keep-newlines": "documents are not split",
    "--lang": "documents are not split",
    "--partitions": "--shard shares the work among machines",
    "--keep-sequential-samples": "the order of the input is kept unless --shuffle-documents is set",
    "--find-optimal-num-workers": "--workers is the number of cores unless you say otherwise",
    "--workers-to-check": "--workers is the number of cores unless you say otherwise",
    "--max-documents": "--workers is the number of cores unless you say otherwise",
}
TIKTOKEN = ("tiktoken_pattern", "tiktoken_num_special_tokens", "special_tokens")
LOG_S = 10.0
"""Seconds between two lines of the log, at least."""


def read_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(parser)
    _add_how(parser)
    _add_tokenizer(parser)
    given = sys.argv[1:] if words is None else words
    for flag, reason in NOT_HERE.items():
        if any(word.split("=")[0] == flag for word in given):
            parser.error(f"{flag} of Megatron-LM's tool is not known here: {reason}")
    args = parser.parse_args(words)
    for name, unit in (("log_interval", "documents"), ("workers", "cores")):
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} is {getattr(args, name)}; it counts {unit}, so at least 1")
    if not 0 < args.journal_mb < math.inf:
        parser.error(f"--journal-mb is {args.journal_mb:g}; it must be a number above 0")
    _refuse_half_commands(parser, args)
    return args


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="JSON lines (.jsonl, also .gz or .zst), Parquet or Arrow files, folders of them, "
        "patterns, or hf://ORG/NAME",
    )
    group.add_argument("--output-prefix", help="writes PREFIX_KEY_document.bin and .idx")
    group.add_argument(
        "--json-keys", nargs="+", metavar="KEY", help="one corpus of each (default: text)"
    )
    group.add_argument(
        "--manifest", type=Path, metavar="FILE.yaml", help="a list of corpora, one after another"
    )
    group.add_argument(
        "--output-root",
        type=Path,
        metavar="DIR",
        help="with --manifest: writes DIR/NAME_text_document.bin and .idx (default: here)",
    )
    group.add_argument(
        "--only", metavar="NAME[,NAME]", help="with --manifest: leave out all other corpora"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument("--append-eod", action="store_true", help="end each document with EOD")
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="at a record that is no document: stop (default), or count it and keep it with its "
        "reason in PREFIX.rejected.jsonl",
    )
    group.add_argument(
        "--shuffle-documents",
        type=int,
        metavar="SEED",
        help="put the documents in a random order at the end, in constant memory (a manifest does "
        "so unless it says `shuffle: false`)",
    )
    group.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="make only the I-th of N parts (from 0), PREFIX-0000I-of-0000N; tools/merge_data.py "
        "joins them",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="cores that tokenize (default: all that this process may use)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    group.add_argument(
        "--journal-mb",
        type=float,
        default=256,
        metavar="MB",
        help="output between two points from which a killed run goes on (default: 256; at the "
        "latest every minute)",
    )
    group.add_argument(
        "--log-interval",
        type=int,
        default=1000,
        help=f"documents between lines of the log, which come at most every {LOG_S:.0f} s",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    from megatron_mlr1.data.tokenizers import LOADERS, TIKTOKEN_PATTERNS

    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=list(LOADERS))
    group.add_argument("--tokenizer-model", help="folder, hub name, or model file")
    group.add_argument(
        "--vocab-size", type=int, help="ids must be smaller (default: the tokenizer's)"
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what the tokenizer's template adds, such as a beginning-of-text token",
    )
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--tiktoken-pattern", choices=list(TIKTOKEN_PATTERNS))
    group.add_argument("--tiktoken-num-special-tokens", type=int, metavar="N")
    group.add_argument(
        "--tokenizer-special-tokens",
        dest="special_tokens",
        nargs="+",
        metavar="TEXT",
        help="of tiktoken",
    )


def _refuse_half_commands(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    here = ("input", "output_prefix", "tokenizer_type")
    of_a_corpus = (
        *(*here, "json_keys", "append_eod", "on_error", "shuffle_documents", "tokenizer_model"),
        *("vocab_size", "tokenizer_hf_no_include_special_tokens", "trust_remote_code"),
        *TIKTOKEN,
    )
    single = args.manifest is None
    missing = [name for name in here if single and getattr(args, name) is None]
    barred = ("output_root", "only") if single else of_a_corpus
    wrong = [name for name in barred if not _is_unset(getattr(args, name))]
    if missing:
        parser.error(f"{', '.join(map(_flag, missing))} is required without --manifest")
    if wrong:
        because = "without --manifest" if single else "with --manifest, which says it"
        parser.error(f"{', '.join(map(_flag, wrong))} makes no sense {because}")


def _is_unset(value: object) -> bool:
    return value is None or value is False


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shard(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", word)
    if not found or not int(found[1]) < int(found[2]) <= 99999:
        raise argparse.ArgumentTypeError(f"{word} is no shard; say I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def plans_of(args: argparse.Namespace) -> Mapping[str, PreprocessPlan]:
    """Make the plan of each corpus that the command line names, by its name."""
    from megatron_mlr1.data.encode import EncodePlan
    from megatron_mlr1.data.jobs import PreprocessPlan
    from megatron_mlr1.data.tokenizers import TokenizerPlan

    journal_bytes = int(args.journal_mb * 2**20)
    if args.manifest is not None:
        from megatron_mlr1.data.manifest import ManifestRun, read_manifest

        run = ManifestRun(
            path=args.manifest,
            output_root=args.output_root or Path(),
            workers=args.workers,
            only=tuple(args.only.split(",")) if args.only else (),
            shard=args.shard,
            overwrite=args.overwrite,
            journal_bytes=journal_bytes,
        )
        return read_manifest(run)
    given = {name: getattr(args, name) for name in TIKTOKEN if getattr(args, name) is not None}
    if "special_tokens" in given:
        given["special_tokens"] = tuple(given["special_tokens"])
    tokenizer = TokenizerPlan(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
        trust_remote_code=args.trust_remote_code,
        **given,
    )
    plan = PreprocessPlan(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        encode=EncodePlan(
            tokenizer=tokenizer,
            json_keys=tuple(args.json_keys or ["text"]),
            append_eod=args.append_eod,
            vocab_size=args.vocab_size,
            workers=args.workers,
            skip_bad=args.on_error == "skip",
        ),
        shard=args.shard,
        shuffle_seed=args.shuffle_documents,
        overwrite=args.overwrite,
        journal_bytes=journal_bytes,
    )
    return {args.output_prefix: plan}


class Report:
    """Says how far all jobs are: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, log_interval: int, total_bytes: int) -> None:
        from tqdm import tqdm

        self._log_interval, self._total = log_interval, total_bytes
        self._before = 0
        """Bytes of the jobs that are done."""
        self._first: Progress | None = None
        self._start_s = self._last_s = time.monotonic()
        self._last_documents = 0
        self._bar: tqdm[NoReturn] = tqdm(
            total=total_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        )

    def show(self, progress: Progress) -> None:
        """Tell how far one job is."""
        if self._first is None or self._first.phase != progress.phase:
            self._first, self._start_s = progress, time.monotonic()
            self._last_documents = progress.documents
        encoding = progress.phase == "encode"
        if not self._bar.disable:
            if encoding:
                self._bar.n = self._before + progress.done_bytes
            self._bar.set_postfix_str(self._words(progress), refresh=False)
            self._bar.update(0)
            return
        now = time.monotonic()
        enough = progress.documents - self._last_documents >= self._log_interval or not encoding
        if enough and now - self._last_s >= LOG_S:
            self._last_s, self._last_documents = now, progress.documents
            print(self._words(progress), file=sys.stderr, flush=True)

    def job_done(self, num_bytes: int) -> None:
        """Count a job that was run, or was done before."""
        self._before += num_bytes
        self._first = None

    def close(self) -> None:
        """Leave the bar."""
        self._bar.close()

    def _words(self, progress: Progress) -> str:
        assert self._first is not None, "a report begins with its first progress"
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        speed = (progress.done_bytes - self._first.done_bytes) / seconds
        if progress.phase == "encode":
            tokens = (progress.tokens - self._first.tokens) / seconds
            left = self._total - self._before - progress.done_bytes
            what = f"{progress.documents:,} documents, {progress.tokens:,} tokens"
            what += f", {tokens:,.0f} tokens/s"
        else:
            left = progress.total_bytes - progress.done_bytes
            what = f"Shuffling {progress.tokens:,} tokens"
        eta = self._bar.format_interval(left / speed) if speed > 0 and left >= 0 else "?"
        return f"{what}, {speed / 1e6:,.1f} MB/s, ETA {eta}"


def main() -> None:
    """Make the corpora and print what they hold."""
    with clean_exit():
        args = read_words()
        gc.disable()  # nothing of what is loaded before the work begins goes away again
        _make(args)


def _make(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megatron_mlr1.data.jobs import prepare
    from megatron_mlr1.data.journal import Stop, StoppedError

    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.ask)
    try:
        plans = plans_of(args)
        jobs = {name: prepare(plan) for name, plan in plans.items()}
        gc.freeze()
        gc.enable()
        report = Report(args.log_interval, sum(job.total_bytes for job in jobs.values()))
        for line in run_all(jobs, report, stop, skip_finished=args.manifest is not None):
            tqdm.write(line)
        report.close()
    except StoppedError as stopped:
        name = signal.Signals(stopped.number).name
        print(f"Stopped by {name}. The same command goes on from here.", file=sys.stderr)
        sys.exit(128 + stopped.number)


def run_all(
    jobs: Mapping[str, Job], report: Report, stop: Stop, *, skip_finished: bool
) -> Iterator[str]:
    """Run one job after another, and tell of each what came out."""
    from tqdm import tqdm

    from megatron_mlr1.data.jobs import finished
    from megatron_mlr1.data.preprocess import preprocess

    documents = tokens = 0
    start_s = time.monotonic()
    for name, job in jobs.items():
        stop.obey()
        summaries = finished(job) if skip_finished else None
        if summaries is not None:
            yield f"{name}: finished before, nothing to do"
        else:
            begin_s = time.monotonic()
            summaries = preprocess(job, report.show, stop)
            yield from (_describe(summary, time.monotonic() - begin_s) for summary in summaries)
        report.job_done(job.total_bytes)
        documents += sum(summary.num_documents for summary in summaries)
        tokens += sum(summary.num_tokens for summary in summaries)
    if len(jobs) > 1:
        took = tqdm.format_interval(time.monotonic() - start_s)
        yield f"All {len(jobs)}: {documents:,} documents, {tokens:,} tokens, {took}"


def _describe(summary: CorpusSummary, seconds: float) -> str:
    records = "record" if summary.num_rejected == 1 else "records"
    rejected = f", {summary.num_rejected:,} {records} rejected" if summary.num_rejected else ""
    return (
        f"{summary.prefix}: {summary.num_documents:,} documents, {summary.num_tokens:,} tokens "
        f"({summary.dtype}){rejected}, {summary.num_tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
