"""`torchrun ... -m megatron_mlr1.train`: the command that trains.

Imports stand inside the functions: the engine's checkpoint writer starts processes that import the
main module again, and CPU mode has to come before the engine.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mlr1.data.mixture import Blend
    from megatron_mlr1.recipes import Plan


def main(words: Sequence[str]) -> int:
    """Train by the words of a command line; give the exit code."""
    from megatron_mlr1.errors import Mlr1Error

    try:
        if not {"-h", "--help"}.isdisjoint(words):
            _print_help()
        else:
            _train(words)
    except Mlr1Error as error:
        _print_error(error)
        return error.exit_code
    return 0


def _train(words: Sequence[str]) -> None:
    from megatron_mlr1 import cpu, recipes
    from megatron_mlr1.model.precision import transformer_engine_version

    plan = recipes.expand(words, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    plan.require_runnable()
    blends = _blends(plan)
    cpu.activate()
    transformer_engine_version()  # before the engine, which would end in a stack trace
    from megatron_mlr1.engine.run import run

    run(plan, blends, rank=_rank())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _print_error(error: Exception) -> None:
    """Print an error once for a run where all processes have it, and else for each that does."""
    import torch.distributed

    from megatron_mlr1.engine.agreement import SHARED

    if SHARED in getattr(error, "__notes__", ()):
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
    elif torch.distributed.is_initialized() and _rank() > 0:
        print(f"[rank {_rank()}] error: {error}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)


def _blends(plan: "Plan") -> "Sequence[Blend]":
    """Find the corpora of all mixtures of a run."""
    from megatron_mlr1.data.mixture import Blend, resolve

    root = plan.options.data_root
    if plan.mixture is None or root is None:
        return ()
    return tuple(
        Blend(first_sample=sample, corpora=resolve(mixture, root))
        for sample, mixture in ((0, plan.mixture), *plan.switches)
    )


def _print_help() -> None:
    from megatron_mlr1 import cpu

    cpu.activate()
    from megatron_mlr1.engine.command_line import parser

    parser().print_help()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
