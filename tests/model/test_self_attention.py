"""The fused split, norm and rotation in the engine's layer, against the engine's own path."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.attention import SelfAttention  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from megatron_mlr1.model.build import build, transformer_config  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402
from megatron_mlr1.model.self_attention import FusedSelfAttention  # noqa: E402
from megatron_mlr1.model.spec import block_spec  # noqa: E402

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
)
LENGTHS = [5, 1, 8, 2]
LIMIT = 2e-6
"""Of a tensor's norm: fp32 sums in another order, a few units of 2^-24 through two layers."""


@pytest.fixture(scope="module")
def groups():
    with one_process() as groups:
        yield groups


@pytest.fixture(scope="module")
def models(groups):
    """The same weights with the engine's path and with the fused one."""
    pair = [
        build(SHAPE, groups, rotary_base=1000, max_positions=64, qk_norm_rope_kernel=kernel)
        for kernel in ("reference", "mlr1")
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def packed_params(lengths):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def value_and_gradients(model, batch, packed=None):
    torch.manual_seed(0)
    length = sum(LENGTHS)
    ids = torch.randint(0, 64, (batch, length))
    logits = model(ids, torch.arange(length).expand_as(ids), None, packed_seq_params=packed)
    model.zero_grad(set_to_none=True)
    (logits * torch.randn_like(logits)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}


def operators(model, **words):
    """How often each operator ran in a forward and a backward."""
    with torch.profiler.profile(acc_events=True) as profile:
        value_and_gradients(model, **words)
    return Counter(event.name for event in profile.events())


def test_the_layers_are_the_fused_ones_unless_the_engines_are_asked_for(models):
    kinds = [[type(layer.self_attention) for layer in m.decoder.layers] for m in models]
    assert kinds == [[SelfAttention] * 2, [FusedSelfAttention] * 2]


def test_a_checkpoint_has_the_same_names(models):
    theirs, ours = (m.state_dict() for m in models)
    assert list(ours) == list(theirs)
    sharded = [m.sharded_state_dict() for m in models]
    assert sharded[0].keys() == sharded[1].keys()


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_the_engines(models, packed):
    words = {"batch": 1, "packed": packed_params(LENGTHS)} if packed else {"batch": 3}
    theirs, ours = (value_and_gradients(m, **words) for m in models)
    assert len(theirs) > 5
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= LIMIT * expected.norm(), name


@pytest.mark.parametrize("packed", [False, True])
def test_one_op_rotates_and_the_engine_does_not_rotate_again(models, packed):
    words = {"batch": 1, "packed": packed_params(LENGTHS)} if packed else {"batch": 3}
    theirs, ours = (operators(m, **words) for m in models)
    assert ours["mlr1::qk_norm_rope"] == ours["mlr1::qk_norm_rope_backward"] == 2
    assert "mlr1::qk_norm_rope" not in theirs
    # The engine's rotation takes the cosine in every layer.
    assert "aten::cos" in theirs


def test_recomputed_layers_give_the_same_bits(models):
    _, model = models
    expected = value_and_gradients(model, batch=2)
    model.decoder.config.recompute_granularity = "full"
    model.decoder.config.recompute_method = "uniform"
    model.decoder.config.recompute_num_layers = 1
    try:
        again = value_and_gradients(model, batch=2)
        ran = operators(model, batch=2)
    finally:
        model.decoder.config.recompute_granularity = None
    assert ran["mlr1::qk_norm_rope"] == 2 * ran["mlr1::qk_norm_rope_backward"] == 4
    for name, value in expected.items():
        assert again[name].equal(value), name


@pytest.mark.parametrize(
    "change",
    [
        {"no_rope_freq": [1, 1]},
        {"flash_decode": True},
        {"attention_output_gate": True},
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_has_no_formula_takes_the_engines_path(groups, change):
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    for name, value in change.items():
        setattr(config, name, value)
    layer = block_spec(config, swiglu_kernel="reference").layer_specs[0]
    attention = build_module(
        layer.submodules.self_attention, config=config, layer_number=1, pg_collection=groups
    )
    assert attention._rotation_of(rotary_pos_emb=torch.zeros(4, 1, 1, 8)) is None


@pytest.mark.parametrize(
    "words",
    [
        {"rotary_pos_emb": None},
        {"rotary_pos_emb": torch.zeros(4, 1, 1, 4)},
        {"rotary_pos_emb": torch.zeros(4, 3, 1, 8)},
        {"rotary_pos_emb": (torch.zeros(4, 1, 1, 8),) * 2},
        {"rotary_pos_emb": torch.zeros(4, 1, 1, 8), "inference_context": object()},
        {
            "rotary_pos_emb": torch.zeros(4, 1, 1, 8),
            "packed_seq_params": PackedSeqParams(qkv_format="sbhd"),
        },
    ],
    ids=["none", "half a head", "several axes", "two embeddings", "inference", "not thd"],
)
def test_what_the_op_cannot_rotate_is_left_to_the_engine(models, words):
    attention = models[1].decoder.layers[0].self_attention
    assert attention._rotation_of(rotary_pos_emb=torch.zeros(4, 1, 1, 8)) is not None
    assert attention._rotation_of(**words) is None


def test_padded_bounds_come_before_the_others(models):
    attention = models[1].decoder.layers[0].self_attention
    packed = packed_params(LENGTHS)
    padded = replace(packed, cu_seqlens_q_padded=packed.cu_seqlens_q + 1)
    angles = torch.zeros(8, 1, 1, 8)
    for params, bounds in ((packed, packed.cu_seqlens_q), (padded, padded.cu_seqlens_q_padded)):
        rotation = attention._rotation_of(rotary_pos_emb=angles, packed_seq_params=params)
        assert rotation.bounds is bounds
