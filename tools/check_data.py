#!/usr/bin/env python
"""Check corpora (.bin/.idx) and say what they hold; ends with code 2 at the first fault."""

import argparse
import sys

from tqdm import tqdm

from megatron_mlr1.data.check import check, checksums
from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.merge import find_corpora
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Check, and print a line for each corpus that has no fault."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="corpora (paths without .bin and .idx), or folders of them",
    )
    parser.add_argument(
        "--vocab-size", type=int, help="read the tokens too: each must be smaller than this"
    )
    parser.add_argument(
        "--checksum",
        action="store_true",
        help="print the SHA-256 of each file, and hold it against the record of the corpus",
    )
    args = parser.parse_args()
    with clean_exit():
        for prefix in find_corpora(args.input):
            quiet = not sys.stderr.isatty() or args.vocab_size is None
            total = bin_path(prefix).stat().st_size
            with tqdm(total=total, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
                corpus = check(prefix, vocab_size=args.vocab_size, on_progress=bar.update)
            print(
                f"{prefix}: {corpus.num_documents:,} documents, {corpus.num_sequences:,} "
                f"sequences, {corpus.num_tokens:,} tokens ({corpus.dtype.name})"
            )
            for path, digest in checksums(prefix).items() if args.checksum else ():
                print(f"{digest}  {path}")


if __name__ == "__main__":
    main()
