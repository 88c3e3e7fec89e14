"""List the packaged recipes, or show the engine flags of one with the source of each value."""

import shlex
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.recipes import Plan, expand
from megatron_mlr1.recipes.sheet import common, mixture, names, packaged

EXAMPLES = """examples:
  python tools/recipes.py list
  python tools/recipes.py show 950m pretrain_phase1 --world-size 128
  python tools/recipes.py show tiny pretrain_phase1 --format words --lr 3e-3
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run the program; an error of the user's ends it with its message alone."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if rest and (arguments.command == "list" or not rest[0].startswith("--")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with clean_exit():
        if arguments.command == "list":
            print(_list())
        else:
            print(_show(arguments, rest))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="models, stages and mixtures")
    show = commands.add_parser(
        "show",
        help="the flags of one recipe",
        epilog="Any further flag, the engine's or ours, is laid over the recipe as in a run.",
        allow_abbrev=False,
    )
    show.add_argument("model", metavar="SIZE")
    show.add_argument("stage", metavar="STAGE")
    show.add_argument("--world-size", type=int, default=1, help="processes of the run (default 1)")
    show.add_argument("--format", choices=("table", "words"), default="table")
    return parser


def _list() -> str:
    stages = sorted(names("stages"), key=_stages_before)
    return "\n\n".join(
        (
            "models\n" + _columns([[n, packaged("models", n).about] for n in names("models")]),
            "stages, in their order\n"
            + _columns([[n, packaged("stages", n).about] for n in stages]),
            "mixtures\n" + _columns([[n, mixture(n).about] for n in names("mixtures")]),
        )
    )


def _stages_before(stage: str) -> int:
    start = packaged("stages", stage).starts_from
    return 0 if start is None else 1 + _stages_before(start)


def _show(arguments: Namespace, rest: Sequence[str]) -> str:
    plan = expand(
        ["--model", arguments.model, "--stage", arguments.stage, *rest], arguments.world_size
    )
    _say_what_is_not_checked(plan)
    words = shlex.join(plan.words)
    if arguments.format == "words":
        return words
    rows = [[f"--{flag.name}", " ".join(flag.values), flag.source] for flag in plan.flags]
    return "\n\n".join((_columns([["flag", "value", "source"], *rows]), *_data(plan), words))


def _say_what_is_not_checked(plan: Plan) -> None:
    sheets = [common(), *(packaged(kind, n) for kind in ("models", "stages") for n in names(kind))]
    known = {flag.name for sheet in sheets for flag in sheet.flags}
    others = [f"--{flag.name}" for flag in plan.flags if flag.name not in known]
    if others:
        print(
            f"not checked: {', '.join(others)}; no recipe has it. A run refuses what Megatron does "
            "not know.",
            file=sys.stderr,
        )


def _data(plan: Plan) -> list[str]:
    start = plan.starts_from
    lines = [f"weights: {'random' if start is None else f'those that {start} left behind'}"]
    if plan.mixture is not None:
        rows = [[c.name, repr(c.weight), c.source, c.dataset] for c in plan.mixture.corpora]
        header = ["corpus", "weight", "source", "data set"]
        lines.append(f"mixture {plan.mixture.name}\n{_columns([header, *rows])}")
    return lines


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Align cells in columns; the last column is left as long as it is."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)) for r in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


if __name__ == "__main__":
    main()
