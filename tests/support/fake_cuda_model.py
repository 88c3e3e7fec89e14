"""A small model on the CUDA device that is not there (`tests.support.fake_cuda`)."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mlr1.model.build import transformer_config
from megatron_mlr1.model.shape import ModelShape
from megatron_mlr1.model.spec import block_spec
from tests.support.fake_cuda import DEVICE

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128,
)


def model_on_device(
    groups: ProcessGroupCollection,
    *,
    dtype: torch.dtype = torch.bfloat16,
    whole_graph: bool = True,
    sequence_parallel: bool = False,
) -> GPTModel:
    """Build a model with a main gradient in fp32 for each parameter; in `fake_cuda` alone.

    Args:
        groups: of this process.
        dtype: of the parameters.
        whole_graph: as for a graph of the whole step, in which nothing may wait for the device.
        sequence_parallel: over the tensor-parallel group.
    """
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    config.use_cpu_initialization = False
    # It would draw from the device's generator.
    config.perform_initialization = False
    config.params_dtype = config.pipeline_dtype = dtype
    config.bf16 = dtype == torch.bfloat16
    config.tensor_model_parallel_size = groups.tp.size()
    config.sequence_parallel = sequence_parallel
    if whole_graph:
        config.cuda_graph_impl = "full_iteration"
    # The engine moves a model to the device when it is made; a fake parameter cannot be moved.
    with DEVICE:
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, swiglu_kernel="mlr1"),
            vocab_size=SHAPE.vocab_size,
            max_sequence_length=64,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            pg_collection=groups,
        )
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    return model
