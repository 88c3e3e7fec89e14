"""Which modules make a layer: Transformer Engine's where it is, torch's and ours where it is not.

Both specs have the same weights under the same names in a checkpoint: Transformer Engine keeps a
norm's weight inside the linear layer behind it, and ours is stored under that name too.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_mlr1.model.attention import CausalAttention
from megatron_mlr1.model.norm import RMSNorm
from megatron_mlr1.ops.swiglu import swiglu

Kernel = Literal["reference", "mlr1"]
"""Implementations of the activation, see `megatron_mlr1.ops.swiglu`."""


class SwiGLU(nn.Module):
    """The activation between the two linear layers of an MLP: [..., 2F] to [..., F]."""

    def __init__(self, *, config: TransformerConfig, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, gate_up: Tensor) -> Tensor:
        """Give silu(gate) * up for [gate | up]."""
        return swiglu(gate_up, kernel=self.kernel)


def block_spec(
    config: TransformerConfig, *, swiglu_kernel: Kernel, vp_stage: int | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """Give the layers of one pipeline stage, by the implementation that `config` names."""
    activation = partial(SwiGLU, kernel=swiglu_kernel)
    if config.transformer_impl == "transformer_engine":
        return ModuleSpec(module=TransformerLayer, submodules=_transformer_engine(activation))
    layer = ModuleSpec(module=TransformerLayer, submodules=_torch(activation))
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _transformer_engine(activation: Callable[..., nn.Module]) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_with_transformer_engine_submodules(
        qk_l2_norm=True, use_te_activation_func=True
    )
    # The engine's MLP builder carries its submodules as a keyword.
    layer.mlp.keywords["submodules"].activation_func = activation
    return layer


def _torch(activation: Callable[..., nn.Module]) -> TransformerLayerSubmodules:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=L2Norm,
        k_layernorm=L2Norm,
    )
    mlp = MLPSubmodules(
        linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=activation
    )
    return TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
