"""Where this process stands among the others. The only file that reads `parallel_state`."""

from dataclasses import dataclass

import torch.distributed
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process's groups and its place in them."""

    tensor_group: ProcessGroup
    context_group: ProcessGroup
    replica_group: ProcessGroup
    """Processes that hold the same part of the model: of all data and context ranks."""
    tensor_rank: int
    tensor_source: int
    """Global rank of the first process in the tensor-parallel group: the one that reads data."""
    data_rank: int
    num_data_ranks: int
    """Copies of the model, each of which trains on other samples."""
    is_first_stage: bool
    is_last_stage: bool
    is_reporter: bool
    """Whether this process writes the log and TensorBoard: the engine's last rank."""

    @property
    def is_end(self) -> bool:
        """Whether this stage sees tokens or labels."""
        return self.is_first_stage or self.is_last_stage

    def reads_data(self, *, packed: bool) -> bool:
        """Tell whether this process takes batches from a loader of its own.

        Args:
            packed: documents are masked, so that stages between the ends need their bounds too.
        """
        return self.tensor_rank == 0 and (self.is_end or packed)


def place(vp_stage: int | None = None) -> Place:
    """Ask the engine, once its groups exist, where this process stands."""
    last_rank = torch.distributed.get_world_size() - 1
    return Place(
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_source=parallel_state.get_tensor_model_parallel_src_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        num_data_ranks=parallel_state.get_data_parallel_world_size(),
        is_first_stage=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_last_stage=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        is_reporter=torch.distributed.get_rank() == last_rank,
    )
