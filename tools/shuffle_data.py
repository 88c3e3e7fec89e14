#!/usr/bin/env python
"""Write a corpus (.bin/.idx) with its documents in a new order, in constant memory."""

import argparse
import sys

from tqdm import tqdm

from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.merge import find_corpora
from megatron_mlr1.data.shuffle import ShufflePlan, shuffle
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Shuffle and print what the new corpus holds."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, metavar="PREFIX", help="the corpus, without .bin and .idx"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--seed",
        type=int,
        required=True,
        help="of the order; the 1/32 of the documents with the highest content hash stand last "
        "for every seed",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    args = parser.parse_args()
    with clean_exit():
        plan = ShufflePlan(
            input_prefix=args.input,
            output_prefix=args.output_prefix,
            seed=args.seed,
            overwrite=args.overwrite,
        )
        total = sum(bin_path(prefix).stat().st_size for prefix in find_corpora([args.input]))
        quiet = not sys.stderr.isatty()
        with tqdm(total=2 * total, unit="B", unit_scale=True, disable=quiet) as bar:
            written = shuffle(plan, bar.update)
        print(
            f"{written.prefix}: {written.num_documents:,} documents, {written.num_tokens:,} tokens "
            f"({written.dtype.name}), shuffled with seed {args.seed}"
        )


if __name__ == "__main__":
    main()
