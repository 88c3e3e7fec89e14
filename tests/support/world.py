"""Processes of a gloo world for a test: they meet at a file, and bring back what a body returns."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing

from tests.support.ranks import forking_context


def run_in_world(size: int, body: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Run `body(*args)` in `size` new processes in CPU mode; give their answers by rank.

    Args:
        size: processes of the world.
        body: a function at the top of a test module; CPU mode is on and the group is there.
        folder: an empty folder of this test.
        args: what can be pickled.
    """
    forking_context()
    torch.multiprocessing.start_processes(
        _member, args=(size, body, folder, args), nprocs=size, start_method="forkserver"
    )
    return [pickle.loads((folder / f"answer{rank}").read_bytes()) for rank in range(size)]


def _member(rank: int, size: int, body: Callable[..., Any], folder: Path, args: Any) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RANK": str(rank)}
    torch.set_num_threads(1 if size > 1 else 2)
    from megatron_mlr1 import cpu

    cpu.activate()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    answer = body(*args)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    (folder / f"answer{rank}").write_bytes(pickle.dumps(answer))
