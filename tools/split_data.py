#!/usr/bin/env python
"""Split a corpus (.bin/.idx) into shards of whole documents; merge_data.py joins them again."""

import argparse
import sys

from tqdm import tqdm

from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.merge import find_corpora
from megatron_mlr1.data.shards import SplitPlan, split
from megatron_mlr1.ending import clean_exit


def main() -> None:
    """Split and print what each shard holds."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, metavar="PREFIX", help="the corpus, without .bin and .idx"
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX_00000_text_document.bin and .idx, PREFIX_00001_text_document ...",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--num-shards", type=int, help="so many shards of about equal tokens")
    size.add_argument("--max-tokens", type=int, help="as many shards as hold no more tokens each")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    args = parser.parse_args()
    with clean_exit():
        plan = SplitPlan(
            input_prefix=args.input,
            output_prefix=args.output_prefix,
            num_shards=args.num_shards,
            max_tokens=args.max_tokens,
            overwrite=args.overwrite,
        )
        total = sum(bin_path(prefix).stat().st_size for prefix in find_corpora([args.input]))
        quiet = not sys.stderr.isatty()
        with tqdm(total=total, unit="B", unit_scale=True, disable=quiet) as bar:
            shards = split(plan, bar.update)
        for shard in shards:
            print(f"{shard.prefix}: {shard.num_documents:,} documents, {shard.num_tokens:,} tokens")


if __name__ == "__main__":
    main()
