"""The engine's groups and random states in a process of its own, for tools that build a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore


@contextmanager
def one_process(*, seed: int = 1) -> Iterator[ProcessGroupCollection]:
    """Hold groups of one rank each, over gloo and without a port; release them at the end.

    On a machine without CUDA, `megatron_mlr1.cpu.activate()` comes first.
    """
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
