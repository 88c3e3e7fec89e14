"""Which activation a layer has, and what is refused before a layer is built."""

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError, MachineError
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core.transformer.attention import SelfAttention  # noqa: E402

from megatron_mlr1.model.build import transformer_config  # noqa: E402
from megatron_mlr1.model.self_attention import FusedSelfAttention  # noqa: E402
from megatron_mlr1.model.spec import (  # noqa: E402
    SwiGLU,
    TeSwiGLU,
    block_spec,
    engine_swiglu,
    refuse_missing,
)
from megatron_mlr1.ops.swiglu import swiglu  # noqa: E402

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
)


def test_transformer_engines_activation_needs_its_layers():
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    with pytest.raises(ConfigError, match="--transformer-impl local"):
        block_spec(config, swiglu_kernel="te")


def test_ligers_activation_needs_liger_and_a_gpu():
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    with pytest.raises(MachineError, match="kernels of liger"):
        block_spec(config, swiglu_kernel="liger")


@pytest.mark.parametrize("kernel", ["mlr1", "reference"])
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_our_own_activation_is_never_refused(kernel, layers):
    refuse_missing(kernel, layers)


def value_and_gradient(function, x, grad):
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("shape", [(6, 2, 32), (7, 1, 10), (13, 6)], ids=str)
def test_the_engines_activation_is_the_definition(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], shape[-1] // 2)
    ours = value_and_gradient(engine_swiglu, x, grad)
    expected = value_and_gradient(lambda x: swiglu(x, kernel="reference"), x, grad)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_on_a_gpu_the_reference_keeps_its_input_alone():
    layer = SwiGLU(config=transformer_config(SHAPE, norm_epsilon=1e-5), kernel="reference")
    x = torch.randn(64, 4, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(64, 4, 2048, device="cuda", dtype=torch.bfloat16)
    ours = value_and_gradient(layer, x, grad)
    expected = value_and_gradient(lambda x: swiglu(x, kernel="reference"), x, grad)
    for got, want in zip(ours, expected, strict=True):
        # The engine rounds silu, and each factor of the gradient, to bf16 where it writes it.
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
    before = torch.cuda.memory_allocated()
    out = layer(x)
    assert torch.cuda.memory_allocated() - before == out.numel() * 2


@pytest.mark.te
@pytest.mark.parametrize(
    ("kernel", "expected"), [("mlr1", FusedSelfAttention), ("reference", SelfAttention)]
)
def test_transformer_engines_layers_get_the_attention_that_is_asked_for(kernel, expected):
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    config.transformer_impl = "transformer_engine"
    spec = block_spec(config, swiglu_kernel="te", qk_norm_rope_kernel=kernel)
    assert spec.submodules.self_attention.module is expected
    assert spec.submodules.mlp.keywords["submodules"].activation_func is TeSwiGLU
