"""The activation that quantises for the layer behind it: when it may, and that no bit changes."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_mlr1 import cpu
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402

from megatron_mlr1.model.build import transformer_config  # noqa: E402
from megatron_mlr1.model.fp8_activation import (  # noqa: E402
    Fp8SwiGLU,
    build_fed,
    reason_against,
)
from megatron_mlr1.model.one_process import one_process  # noqa: E402
from megatron_mlr1.model.precision import transformer_engine_version  # noqa: E402
from megatron_mlr1.ops.swiglu import swiglu  # noqa: E402

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=64,
)
HISTORY, STEPS = 3, 6


def config_of(**changes):
    """A run in FP8 with delayed scaling, but for the changes."""
    config = replace(
        transformer_config(SHAPE, norm_epsilon=1e-5),
        use_cpu_initialization=False,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    values = {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": HISTORY,
        "fp8_amax_compute_algo": "max",
        "transformer_impl": "transformer_engine",
    }
    for name, value in {**values, **changes}.items():
        setattr(config, name, value)
    return config


class TwoLayers(nn.Module):
    """What the engine's MLP is, out of torch's modules."""

    def __init__(self, *, config, width):
        super().__init__()
        self.linear_fc1 = nn.Linear(width, 4 * width, bias=False)
        self.activation_func = Fp8SwiGLU(config=config)
        self.linear_fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.linear_fc2(self.activation_func(self.linear_fc1(x)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fp8": None}, "not in FP8"),
        ({"fp8_recipe": "tensorwise"}, "the recipe is tensorwise"),
        ({"fp8_recipe": "blockwise"}, "the recipe is blockwise"),
        ({"transformer_impl": "local"}, "transformer_impl"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl"),
        ({"cpu_offloading": True}, "cpu_offloading"),
        ({"fine_grained_activation_offloading": True}, "fine_grained_activation_offloading"),
        ({"tp_comm_overlap": True}, "tp_comm_overlap"),
    ],
)
def test_a_run_that_does_not_fit_is_told_why(changes, words):
    assert words in reason_against(config_of(**changes))


@pytest.mark.skipif(transformer_engine_version() is not None, reason="it is installed here")
def test_without_transformer_engine_the_reason_is_that():
    assert reason_against(config_of()) == "there is no Transformer Engine"


def test_where_it_may_not_it_is_the_plain_activation_and_says_so_once(caplog):
    torch.manual_seed(0)
    config = config_of(fp8_recipe="mxfp8")
    with caplog.at_level(logging.WARNING):
        mlps = [build_fed(TwoLayers, config=config, width=8) for _ in range(2)]
    assert len([text for text in caplog.messages if "the recipe is mxfp8" in text]) == 1
    mlp = mlps[0]
    assert [name for name, _ in mlp.named_parameters()] == [
        "linear_fc1.weight",
        "linear_fc2.weight",
    ]
    x = torch.randn(5, 8, requires_grad=True)
    out = mlp(x)
    gate_up = x @ mlp.linear_fc1.weight.t()
    expected = swiglu(gate_up, kernel="mlr1") @ mlp.linear_fc2.weight.t()
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.fixture(scope="module")
def groups():
    with one_process() as made:
        yield made


def engine_mlp(config, groups, *, fed):
    """The engine's MLP of Transformer Engine's layers; not fed, its activation is the plain one."""
    build = get_gpt_layer_with_transformer_engine_submodules(
        qk_l2_norm=True, use_te_activation_func=True
    ).mlp
    build.keywords["submodules"].activation_func = Fp8SwiGLU
    words = {"config": config, "pg_collection": groups, "is_mtp_layer": False}
    return (build_fed(build, **words) if fed else build(**words)).cuda()


def run_of(mlp, config, *, recompute, groups):
    """Steps of two micro batches each: outputs, gradients, and the scales and amaxes left."""
    from megatron.core.extensions.transformer_engine import te_checkpoint
    from megatron.core.fp8_utils import get_fp8_context

    generator = torch.Generator("cuda").manual_seed(0)
    kept, fused = [], []
    mlp.linear_fc2.register_forward_pre_hook(
        lambda _, inputs: fused.append(type(inputs[0]).__name__ == "Float8Tensor")
    )
    for step in range(STEPS):
        mlp.zero_grad()
        x = (1 + step) * torch.randn(32, 2, 64, generator=generator, device="cuda")
        x = x.bfloat16().requires_grad_()
        with get_fp8_context(config):
            outs = []
            for part in (x, 2 * x):
                if recompute:
                    out, _ = te_checkpoint(mlp, False, get_cuda_rng_tracker, groups.tp, part)
                else:
                    out, _ = mlp(part)
                outs.append(out)
        torch.cat(outs).float().square().mean().backward()
        state = mlp.linear_fc2.fp8_meta["scaling_fwd"]
        kept += [out.detach() for out in outs]
        kept += [x.grad, *(p.grad.clone() for p in mlp.parameters())]
        kept += [state.scale.clone(), state.amax_history.clone()]
    return kept, fused


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.ext
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_engines_layer_gives_the_same_bits_with_it_and_without(recompute, groups):
    config = config_of()
    reason = reason_against(config)
    if reason is not None:
        pytest.skip(reason)
    fed, plain = (engine_mlp(config, groups, fed=fed) for fed in (True, False))
    plain.load_state_dict(fed.state_dict())
    ours, was_fused = run_of(fed, config, recompute=recompute, groups=groups)
    theirs, was_plain = run_of(plain, config, recompute=recompute, groups=groups)
    # All but the first call of the first step; of recomputed layers the first passes alone.
    assert sum(was_fused) == 2 * STEPS - 1
    assert not any(was_plain)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.te
@pytest.mark.ext
def test_what_waits_for_the_backward_is_the_columnwise_copy_alone(groups):
    from megatron.core.fp8_utils import get_fp8_context

    config = config_of()
    reason = reason_against(config)
    if reason is not None:
        pytest.skip(reason)
    mlp, seen = engine_mlp(config, groups, fed=True), []
    mlp.linear_fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for _ in range(2):
        with get_fp8_context(config):
            out, _ = mlp(torch.ones(16, 2, 64, device="cuda", dtype=torch.bfloat16))
    assert seen[1]._data is None
    assert seen[1]._transpose.shape == (192, 16, 2)
    out.sum().backward()
