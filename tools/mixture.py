#!/usr/bin/env python
"""Show what a mixture means for a run: samples, tokens and epochs of each corpus."""

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_mlr1.data.disk import whole_file
from megatron_mlr1.data.mixture_picture import draw_readings
from megatron_mlr1.data.mixture_report import (
    MOST_EPOCHS,
    Reading,
    plan_run,
    pools_below,
    published_pools,
    read,
    table,
    title,
    warnings,
)
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.errors import ConfigError

EXAMPLES = """examples:
  python tools/mixture.py show pretrain_phase1 --model 950m --stage pretrain_phase1
  python tools/mixture.py show mine.yaml --data-root /corpora --seq-length 2048 \\
      --train-samples 1000000
  python tools/mixture.py plot pretrain_phase1 --mixture-switch 1024000000=pretrain_phase2 \\
      --seq-length 2048 --train-samples 2048000000 --output mixture.png
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with its message alone."""
    args = _parser().parse_args(words)
    with clean_exit():
        _show(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("show", "a table, and a warning of each corpus that is read too often"),
        ("tokens", "the same numbers for programs"),
        ("plot", "shares and epochs as a picture"),
    ):
        command = commands.add_parser(name, help=about, allow_abbrev=False)
        command.add_argument("mixture", metavar="MIXTURE", help="a packaged name, or a YAML file")
        command.add_argument(
            "--mixture-switch", metavar="SAMPLE=NAME|FILE[,...]", help="as in training"
        )
        command.add_argument(
            "--data-root",
            type=Path,
            metavar="DIR",
            help="the corpora, as in training; without it the sizes are those of the paper",
        )
        command.add_argument("--model", metavar="SIZE", help="with --stage: take length and batch")
        command.add_argument("--stage", metavar="STAGE", help="of this recipe")
        command.add_argument("--seq-length", type=int, metavar="L", help="tokens of a sample")
        command.add_argument("--train-samples", type=int, metavar="N", help="samples of the run")
        command.add_argument(
            "--max-epochs",
            type=float,
            default=MOST_EPOCHS,
            metavar="E",
            help="warn of corpora that are read more often (default 4, after arXiv 2305.16264)",
        )
        if name == "tokens":
            command.add_argument("--format", choices=("csv", "json"), default="csv")
        if name == "plot":
            command.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser


def _show(args: argparse.Namespace) -> None:
    if (args.model is None) != (args.stage is None):
        raise ConfigError("--model and --stage name a recipe together; give both, or neither.")
    if not 0 < args.max_epochs < math.inf:
        raise ConfigError(f"--max-epochs is {args.max_epochs:g}; it must be a number above 0.")
    run = plan_run(
        args.mixture,
        args.mixture_switch,
        stage=None if args.model is None else (args.model, args.stage),
        seq_length=args.seq_length,
        num_samples=args.train_samples,
    )
    if args.data_root is None:
        pools = published_pools(run)
        print("Sizes of the corpora: paper v1 Table 3; ? where it has none.", file=sys.stderr)
    else:
        pools = pools_below(run, args.data_root)
    readings = read(run, pools)
    if args.command == "tokens":
        _print_numbers(readings, args.format)
        return
    for warning in warnings(readings, args.max_epochs):
        print(f"warning: {warning}", file=sys.stderr)
    if args.command == "show":
        print(f"{title(run)}\n\n{table(run, readings)}")
    else:
        _write_picture(readings, title(run), args.max_epochs, args.output)


def _print_numbers(readings: Sequence[Reading], kind: str) -> None:
    rows = [asdict(it) for it in readings]
    if kind == "json":
        print(json.dumps(rows, indent=1))
        return
    writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"weights": " ".join(map(repr, row["weights"]))})


def _write_picture(
    readings: Sequence[Reading], heading: str, most_epochs: float, path: Path
) -> None:
    """Write the picture: it is there whole, or not at all."""
    with whole_file(path, "--output") as file:
        draw_readings(readings, heading, most_epochs, file)


if __name__ == "__main__":
    main()
