"""`torchrun ... -m megatron_mlr1.train`: the command that trains."""

import os
import sys
from collections.abc import Sequence

from megatron_mlr1 import cpu
from megatron_mlr1.data.mixture import ResolvedCorpus, resolve
from megatron_mlr1.errors import Mlr1Error
from megatron_mlr1.recipes import expand


def main(words: Sequence[str]) -> int:
    """Train by the words of a command line; give the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        if not {"-h", "--help"}.isdisjoint(words):
            return _help()
        plan = expand(words, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        plan.require_runnable()
        corpora: Sequence[ResolvedCorpus] = ()
        if plan.mixture is not None and plan.options.data_root is not None:
            corpora = resolve(plan.mixture, plan.options.data_root)
        cpu.activate()
        # The engine's modules ask for CUDA as they are imported, so CPU mode comes first.
        from megatron_mlr1.engine.run import run

        run(plan, corpora, rank=rank)
    except Mlr1Error as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _help() -> int:
    cpu.activate()
    from megatron_mlr1.engine.command_line import parser

    parser().print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
