#!/usr/bin/env python
"""Make corpora (.bin/.idx) of JSON lines; takes the flags of Megatron-LM's tool of this name."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from megatron_mlr1.data.preprocess import PreprocessPlan, preprocess
from megatron_mlr1.data.records import find_files
from megatron_mlr1.data.tokenizers import LOADERS, TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import Mlr1Error

NOT_HERE = {
    "--split-sentences": "documents are not split; give a list of sentences as the text instead",
    "--keep-newlines": "documents are not split",
    "--lang": "documents are not split",
    "--partitions": "--workers alone shares the work, in the order of the input",
    "--keep-sequential-samples": "the order of the input is always kept",
    "--find-optimal-num-workers": "choose --workers by the number of cores",
    "--workers-to-check": "choose --workers by the number of cores",
    "--max-documents": "choose --workers by the number of cores",
}


def read_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, help="file of JSON lines (.gz too), or a pattern of such files"
    )
    parser.add_argument(
        "--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY")
    parser.add_argument("--append-eod", action="store_true", help="end each document with EOD")
    parser.add_argument("--workers", type=int, required=True, help="processes that tokenize")
    parser.add_argument(
        "--log-interval", type=int, default=1000, help="documents between lines of the log"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=list(LOADERS))
    group.add_argument("--tokenizer-model", help="folder, hub name, or SentencePiece .model file")
    group.add_argument(
        "--vocab-size", type=int, help="ids must be smaller (default: the tokenizer's)"
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what the tokenizer's template adds, such as a beginning-of-text token",
    )
    group.add_argument("--trust-remote-code", action="store_true")
    given = sys.argv[1:] if words is None else words
    for flag, reason in NOT_HERE.items():
        if any(word.split("=")[0] == flag for word in given):
            parser.error(f"{flag} of Megatron-LM's tool is not known here: {reason}")
    args = parser.parse_args(words)
    if args.log_interval < 1:
        parser.error(f"--log-interval is {args.log_interval}; it counts documents, so at least 1")
    return args


def main() -> None:
    """Make the corpora and print what they hold."""
    args = read_words()
    signal.signal(signal.SIGTERM, _stop)
    start = time.monotonic()
    try:
        inputs = find_files(args.input)
        tokenizer = load_tokenizer(
            TokenizerPlan(
                tokenizer_type=args.tokenizer_type,
                tokenizer_model=args.tokenizer_model,
                vocab_size=args.vocab_size,
                include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
                trust_remote_code=args.trust_remote_code,
            )
        )
        plan = PreprocessPlan(
            inputs=tuple(inputs),
            output_prefix=args.output_prefix,
            json_keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            workers=args.workers,
            vocab_size=args.vocab_size,
            overwrite=args.overwrite,
        )
        with progress(inputs, args.log_interval) as on_progress:
            summaries = preprocess(plan, tokenizer, on_progress)
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    seconds = time.monotonic() - start
    for summary in summaries:
        print(
            f"{summary.prefix}: {summary.num_documents:,} documents, {summary.num_tokens:,} tokens "
            f"({summary.dtype}), {summary.num_tokens / seconds:,.0f} tokens/s"
        )


@contextmanager
def progress(inputs: Sequence[Path], log_interval: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and elsewhere a line every `log_interval` documents."""
    documents, start = 0, time.monotonic()
    total = sum(path.stat().st_size for path in inputs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def on_progress(num_documents: int, num_bytes: int) -> None:
            nonlocal documents
            before, documents = documents, documents + num_documents
            bar.update(num_bytes)
            bar.set_postfix(documents=documents)
            if bar.disable and documents // log_interval > before // log_interval:
                rate = documents / (time.monotonic() - start)
                print(f"Processed {documents} documents ({rate:.0f} docs/s).", file=sys.stderr)

        yield on_progress


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
