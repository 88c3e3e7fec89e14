"""Which modules make a layer: Transformer Engine's where it is, torch's and ours where it is not.

Both specs have the same weights under the same names in a checkpoint: Transformer Engine keeps a
norm's weight inside the linear layer behind it, and ours is stored under that name too.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from megatron.core.extensions.transformer_engine import TEActivationOp
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
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

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.model.attention import CausalAttention
from megatron_mlr1.model.fp8_activation import Fp8SwiGLU, build_fed
from megatron_mlr1.model.norm import FinalRMSNorm, RMSNorm
from megatron_mlr1.model.self_attention import FusedSelfAttention
from megatron_mlr1.ops import swiglu as activation
from megatron_mlr1.ops.libraries import require

Kernel = Literal["reference", "mlr1", "mlr1_fp8", "liger", "te"]
"""Implementations of the activation: those of `megatron_mlr1.ops.swiglu`, but "reference" on a GPU
is the engine's own, see `engine_swiglu`; "mlr1_fp8", which quantises for the layer behind it
(`model.fp8_activation`); and "te", Transformer Engine's own."""

RotationKernel = Literal["reference", "mlr1"]
"""Who splits, normalises and rotates the fused QKV: the engine, or `FusedSelfAttention`."""


class SwiGLU(nn.Module):
    """The activation between the two linear layers of an MLP: [..., 2F] to [..., F]."""

    def __init__(self, *, config: TransformerConfig, kernel: activation.Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, gate_up: Tensor) -> Tensor:
        """Give silu(gate) * up for [gate | up]."""
        if self.kernel == "reference" and gate_up.is_cuda:
            return engine_swiglu(gate_up)
        return activation.swiglu(gate_up, kernel=self.kernel)


class TeSwiGLU(nn.Module):
    """The same by Transformer Engine, without a state of its own.

    The op has no weights but stores an empty state, and a checkpoint that another activation's run
    wrote would not load into it.
    """

    def __init__(self, *, config: TransformerConfig) -> None:
        super().__init__()
        # In a list, so that it does not become a part of this module.
        self._op = [TEActivationOp(config=config)]

    def forward(self, gate_up: Tensor) -> Tensor:
        """Give silu(gate) * up for [gate | up]."""
        out: Tensor = self._op[0](gate_up)
        return out


def engine_swiglu(gate_up: Tensor) -> Tensor:
    """Give silu(gate) * up as the engine's own layers do on a GPU: compiled by torch.

    Args:
        gate_up: [T, 2F] or [S, B, 2F]; it alone is kept for the backward. Plain torch keeps what
            it made in fp32, too: 53 GB for the layers of the 950M and 32,768 tokens.
    """
    out: Tensor = bias_swiglu_impl(gate_up, None)
    return out


def block_spec(
    config: TransformerConfig,
    *,
    swiglu_kernel: Kernel,
    qk_norm_rope_kernel: RotationKernel = "mlr1",
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules | ModuleSpec:
    """Give the layers of one pipeline stage, by the implementation that `config` names.

    Raises:
        ConfigError: the activation is Transformer Engine's and the layers are not.
        MachineError: the activation's library is not there, or has no device to run on.
    """
    refuse_missing(swiglu_kernel, config.transformer_impl)
    attention = FusedSelfAttention if qk_norm_rope_kernel == "mlr1" else SelfAttention
    if config.transformer_impl == "transformer_engine":
        submodules = _transformer_engine(swiglu_kernel, attention)
        return ModuleSpec(module=TransformerLayer, submodules=submodules)
    layer = ModuleSpec(module=TransformerLayer, submodules=_torch(swiglu_kernel, attention))
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=FinalRMSNorm)


def refuse_missing(swiglu_kernel: Kernel, transformer_impl: str) -> None:
    """Stop before any layer is built where the activation cannot run.

    Raises:
        ConfigError: the activation is Transformer Engine's and the layers are not.
        MachineError: the activation's library is not there, or has no device to run on.
    """
    if swiglu_kernel == "te" and transformer_impl != "transformer_engine":
        raise ConfigError(
            "--mlr1-kernels swiglu=te is Transformer Engine's activation, but the layers are of "
            f"--transformer-impl {transformer_impl}. Install Transformer Engine (pip install "
            "--no-build-isolation '.[fp8]') and set --transformer-impl transformer_engine, or take "
            "swiglu=mlr1."
        )
    if swiglu_kernel == "liger":
        require("liger")


def _activation(kernel: Kernel) -> Callable[..., nn.Module]:
    if kernel == "mlr1_fp8":
        return Fp8SwiGLU
    return TeSwiGLU if kernel == "te" else partial(SwiGLU, kernel=kernel)


def _mlp(kernel: Kernel, build: Callable[..., MLP]) -> Callable[..., nn.Module]:
    return partial(build_fed, build) if kernel == "mlr1_fp8" else build


def _transformer_engine(
    kernel: Kernel, attention: type[SelfAttention]
) -> TransformerLayerSubmodules:
    layer = get_gpt_layer_with_transformer_engine_submodules(
        qk_l2_norm=True, use_te_activation_func=True
    )
    layer.self_attention.module = attention
    # The engine's MLP builder carries its submodules as a keyword.
    layer.mlp.keywords["submodules"].activation_func = _activation(kernel)
    layer.mlp = _mlp(kernel, layer.mlp)
    return layer


def _torch(kernel: Kernel, attention: type[SelfAttention]) -> TransformerLayerSubmodules:
    assert kernel != "te", "refused where the layers are torch's"
    qkv_to_out = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=L2Norm,
        k_layernorm=L2Norm,
    )
    mlp = MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        linear_fc2=RowParallelLinear,
        activation_func=_activation(kernel),
    )
    return TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=attention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=qkv_to_out,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=_mlp(kernel, partial(MLP.as_mlp_submodule, submodules=mlp)),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
