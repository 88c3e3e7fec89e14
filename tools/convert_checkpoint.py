"""Convert weights between the engine's checkpoints and Hugging Face folders."""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mlr1 import cpu
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.model.precision import transformer_engine_version

if TYPE_CHECKING:
    from megatron_mlr1.checkpoint.convert import Report


def main(words: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with its message alone."""
    parser = _parser()
    plan = parser.parse_args(words)
    if plan.direction == "megatron-to-hf" and not 0 < plan.max_shard_gb < math.inf:
        parser.error(f"--max-shard-gb is {plan.max_shard_gb:g}; it must be a number above 0")
    with clean_exit(), warnings.catch_warnings():
        if not sys.warnoptions:
            # The engine warns of a dozen absent accelerators and of classes that it will replace;
            # none of that is about weights.
            warnings.simplefilter("ignore")
            logging.getLogger("megatron").setLevel(logging.ERROR)
        report = _convert(plan)
        size = f"{report.num_bytes / 1e9:.2f} GB {str(report.dtype).removeprefix('torch.')}"
        print(f"{plan.save}: {report.num_parameters:,} parameters, {size}")
        print(f"  weights from {report.source}")
        print(f"  tokenizer from {report.tokenizer}" if report.tokenizer else "  no tokenizer")
        if report.difference:
            print(f"  verified: {report.difference}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser(
        "megatron-to-hf", help="export a run as a Hugging Face folder", allow_abbrev=False
    )
    to_megatron = directions.add_parser(
        "hf-to-megatron", help="make a checkpoint that runs start from", allow_abbrev=False
    )
    for direction in (to_hf, to_megatron):
        direction.add_argument(
            "--load", type=Path, required=True, metavar="DIR", help="what to read"
        )
        direction.add_argument(
            "--save", type=Path, required=True, metavar="DIR", help="what to make"
        )
        direction.add_argument(
            "--verify", action="store_true", help="run both models on the same tokens and compare"
        )
        direction.add_argument("--overwrite", action="store_true", help="replace what is at --save")
    to_hf.add_argument(
        "--iteration", type=int, metavar="N", help="which one; the latest if not given"
    )
    to_hf.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="its folder; the run's own if not given"
    )
    to_hf.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    to_hf.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest weight file (default 5)",
    )
    return parser


def _convert(plan: argparse.Namespace) -> "Report":
    # The engine asks for CUDA while it is imported, and imports Transformer Engine where that is.
    cpu.activate()
    transformer_engine_version()
    from megatron_mlr1.checkpoint.convert import DTYPES, hf_to_megatron, megatron_to_hf

    if plan.direction == "hf-to-megatron":
        return hf_to_megatron(plan.load, plan.save, overwrite=plan.overwrite, verify=plan.verify)
    return megatron_to_hf(
        plan.load,
        plan.save,
        iteration=plan.iteration,
        tokenizer=plan.tokenizer,
        dtype=DTYPES[plan.dtype],
        max_shard_bytes=int(plan.max_shard_gb * 1e9),
        overwrite=plan.overwrite,
        verify=plan.verify,
    )


if __name__ == "__main__":
    main()
