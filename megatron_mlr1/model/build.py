"""A MobileLLM-R1 from its sizes: the engine's configuration and the model itself."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import silu

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.model.shape import ModelShape
from megatron_mlr1.model.spec import Kernel, RotationKernel, block_spec

REQUIRED: dict[str, object] = {
    "qk_l2_norm": True,
    "rotary_interleaved": True,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "use_mup": False,
    "mtp_num_layers": None,
    "activation_func": silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "linear_attention_freq": None,
    "heterogeneous_block_specs": False,
}
"""What makes a decoder a MobileLLM-R1, by the names of the engine's configuration.

muP and layers that predict further tokens change what the head gives; neither the fused losses nor
the published layout know them. What follows them would ask for other layers than `block_spec`
gives: they would be built as ever, and the flag would do nothing.
"""


def finish(config: TransformerConfig) -> TransformerConfig:
    """Check that a configuration is a MobileLLM-R1's, and set what no flag can set.

    All linear layers start from N(0, init_method_std): the published models are initialised by
    `transformers`, which does not scale output projections by 1/sqrt(2 * layers) as the engine
    would.

    Raises:
        ConfigError: a value that the architecture fixes is another one.
    """
    for name, value in REQUIRED.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name} is {_text(getattr(config, name))}; a MobileLLM-R1 has {_text(value)}. "
                "Take out the flag that changes it, or name the model with --model, which sets it."
            )
    if config.num_attention_heads % config.num_query_groups:
        raise ConfigError(
            f"{config.num_attention_heads} attention heads do not split over "
            f"{config.num_query_groups} query groups; each group must serve as many heads. Change "
            "--num-query-groups or --num-attention-heads."
        )
    config.output_layer_init_method = config.init_method
    # Our SwiGLU takes the place that the engine keeps for Transformer Engine's activation.
    config.use_te_activation_func = True
    config.bias_activation_fusion = False
    return config


def _text(value: object) -> str:
    """Write a value for a person: a function by its name alone."""
    return str(getattr(value, "__name__", repr(value)))


def transformer_config(shape: ModelShape, *, norm_epsilon: float) -> TransformerConfig:
    """Give the configuration of an fp32 model on one device, for conversion and proof."""
    return finish(
        TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            kv_channels=shape.kv_channels,
            layernorm_epsilon=norm_epsilon,
            init_method_std=0.02,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            transformer_impl="local",
            use_cpu_initialization=True,
            params_dtype=torch.float32,
            **REQUIRED,
        )
    )


def build(
    shape: ModelShape,
    groups: ProcessGroupCollection,
    *,
    rotary_base: float,
    max_positions: int,
    norm_epsilon: float = 1e-5,
    swiglu_kernel: Kernel = "mlr1",
    qk_norm_rope_kernel: RotationKernel = "mlr1",
) -> GPTModel:
    """Build a whole fp32 model in one process, without the engine's arguments.

    Args:
        shape: the sizes.
        groups: process groups of one rank each.
        rotary_base: theta of the rotary embedding.
        max_positions: positions that the rotary embedding is asked for at the most.
        norm_epsilon: what is added to the mean square in every norm, QK-norm too.
        swiglu_kernel: implementation of the activation.
        qk_norm_rope_kernel: who takes the fused QKV apart, norms and rotates it.
    """
    config = transformer_config(shape, norm_epsilon=norm_epsilon)
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(
            config, swiglu_kernel=swiglu_kernel, qk_norm_rope_kernel=qk_norm_rope_kernel
        ),
        vocab_size=shape.vocab_size,
        max_sequence_length=max_positions,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        pg_collection=groups,
    )
