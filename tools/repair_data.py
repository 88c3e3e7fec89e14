#!/usr/bin/env python
"""Repair a corpus (.bin/.idx) into a new one; the damaged one is left as it is."""

import argparse
import sys

from tqdm import tqdm

from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.merge import find_corpora
from megatron_mlr1.data.repair import RepairPlan, repair
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Repair and print what the new corpus holds and what was left out."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, metavar="PREFIX", help="the corpus, without .bin and .idx"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="leave out last documents that are not whole, or bytes that belong to no document",
    )
    parser.add_argument(
        "--sequences-as-documents",
        action="store_true",
        help="make each sequence a document, where the borders of the documents are lost",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    args = parser.parse_args()
    with clean_exit():
        plan = RepairPlan(
            input_prefix=args.input,
            output_prefix=args.output_prefix,
            truncate=args.truncate,
            sequences_as_documents=args.sequences_as_documents,
            overwrite=args.overwrite,
        )
        total = sum(bin_path(prefix).stat().st_size for prefix in find_corpora([args.input]))
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar:
            written, num_lost = repair(plan, bar.update)
        print(
            f"{written.prefix}: {written.num_documents:,} documents, {written.num_tokens:,} tokens "
            f"({written.dtype.name}); {num_lost:,} documents left out"
        )


if __name__ == "__main__":
    main()
