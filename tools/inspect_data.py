#!/usr/bin/env python
"""Show what corpora hold, and which benchmarks they hold pieces of."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.inspection import InspectionPlan, inspect
from megatron_mlr1.data.inspection_words import as_json, as_text
from megatron_mlr1.data.merge import find_corpora
from megatron_mlr1.data.tokenizers import LOADERS, Tokenizer, TokenizerPlan, load_tokenizer
from megatron_mlr1.ending import clean_exit


def read_words(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "corpora",
        nargs="+",
        metavar="PREFIX",
        help="corpora (paths without .bin and .idx), or folders of them",
    )
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
    with clean_exit():
        tokenizer = read_tokenizer(args)
        corpora = find_corpora(args.corpora)
        against = [open_corpus(prefix) for prefix in find_corpora(args.against)]
        plan = InspectionPlan(
            prefixes=tuple(corpora),
            num_samples=args.samples,
            seed=args.seed,
            ngram=args.ngram,
            report=args.report,
            picture=args.picture,
        )
        for finding in inspect(plan, against, tokenizer):
            if args.json:
                print(json.dumps(as_json(finding, against), ensure_ascii=False), flush=True)
            else:
                print(as_text(finding, tokenizer, against, args.ngram), flush=True)
            for warning in finding.warnings:
                print(warning, file=sys.stderr)


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


if __name__ == "__main__":
    main()
