"""Which activation a layer has, and what is refused before a layer is built."""

import pytest

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError, MachineError
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core.transformer.attention import SelfAttention  # noqa: E402

from megatron_mlr1.model.build import transformer_config  # noqa: E402
from megatron_mlr1.model.self_attention import FusedSelfAttention  # noqa: E402
from megatron_mlr1.model.spec import block_spec, refuse_missing  # noqa: E402

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


@pytest.mark.te
@pytest.mark.parametrize(
    ("kernel", "expected"), [("mlr1", FusedSelfAttention), ("reference", SelfAttention)]
)
def test_transformer_engines_layers_get_the_attention_that_is_asked_for(kernel, expected):
    from megatron.core.extensions.transformer_engine import TEActivationOp

    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    config.transformer_impl = "transformer_engine"
    spec = block_spec(config, swiglu_kernel="te", qk_norm_rope_kernel=kernel)
    assert spec.submodules.self_attention.module is expected
    assert spec.submodules.mlp.keywords["submodules"].activation_func is TEActivationOp
