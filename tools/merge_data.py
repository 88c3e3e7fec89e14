#!/usr/bin/env python
"""Merge corpora (.bin/.idx) into one; the bytes are those of Megatron-LM's merge_datasets.py."""

import argparse
import sys

from tqdm import tqdm

from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.merge import find_corpora, merge
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Merge and print what the new corpus holds."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="corpora (paths without .bin and .idx) in this order, or folders of them, which are "
        "taken in the order of their names",
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    args = parser.parse_args()
    with clean_exit():
        prefixes = find_corpora(args.input)
        total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar:
            written = merge(
                prefixes, args.output_prefix, overwrite=args.overwrite, on_progress=bar.update
            )
        print(
            f"{written.prefix}: {written.num_documents:,} documents, {written.num_tokens:,} tokens "
            f"({written.dtype.name}) of {len(prefixes)} corpora"
        )


if __name__ == "__main__":
    main()
