"""Attention and norm against their definitions, and what `finish` fixes and refuses."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from megatron_mlr1.model.attention import CausalAttention, varlen_can  # noqa: E402
from megatron_mlr1.model.build import finish, transformer_config  # noqa: E402
from megatron_mlr1.model.norm import RMSNorm  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=64,
)


@pytest.fixture(scope="module")
def attention():
    with one_process() as groups:
        yield CausalAttention(
            config=transformer_config(SHAPE, norm_epsilon=1e-5),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=groups,
        ).double()


def definition(q_SBHD, k_SBGD, v_SBGD):
    """softmax(q k^T / sqrt(D), over the keys up to the query's own place) v."""
    length, width = q_SBHD.size(0), q_SBHD.size(3)
    times = q_SBHD.size(2) // k_SBGD.size(2)
    k_SBHD, v_SBHD = (x.repeat_interleave(times, dim=2) for x in (k_SBGD, v_SBGD))
    scores = torch.einsum("sbhd,tbhd->bhst", q_SBHD, k_SBHD) / width**0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, v_SBHD).flatten(2)


def qkv(length, batch):
    torch.manual_seed(length)
    return [
        torch.randn(length, batch, heads, 4, dtype=torch.float64, requires_grad=True)
        for heads in (6, 2, 2)
    ]


def with_gradients(out, inputs):
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs)]


@pytest.mark.parametrize(("length", "batch"), [(16, 2), (1, 1), (13, 3)])
def test_attention_is_its_definition(attention, length, batch):
    inputs = qkv(length, batch)
    out = attention(*inputs, None, attn_mask_type=AttnMaskType.causal)
    ours = with_gradients(out, inputs)
    for got, expected in zip(ours, with_gradients(definition(*inputs), inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", [[8, 8], [1, 13, 2], [16]])
def test_packed_documents_attend_to_themselves_alone(attention, lengths):
    inputs = qkv(sum(lengths), 1)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    out = attention(
        *(x.squeeze(1) for x in inputs),
        None,
        attn_mask_type=AttnMaskType.causal,
        packed_seq_params=packed,
    )
    alone = [definition(*(x[a:b] for x in inputs)) for a, b in pairwise(bounds.tolist())]
    expected = with_gradients(torch.cat(alone).squeeze(1), inputs)
    for got, want in zip(with_gradients(out, inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("dtype", "width", "dropout"),
    [(torch.bfloat16, 64, 0.0), (torch.float32, 64, 0.0), (torch.bfloat16, 64, 0.1)],
)
def test_on_the_cpu_documents_are_attended_one_by_one(dtype, width, dropout):
    assert not varlen_can(torch.zeros(2, 1, width, dtype=dtype), dropout)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "dropout", "can"),
    [
        (torch.bfloat16, 64, 0.0, True),
        (torch.float16, 256, 0.0, True),
        (torch.float32, 64, 0.0, False),
        (torch.bfloat16, 20, 0.0, False),
        (torch.bfloat16, 264, 0.0, False),
        (torch.bfloat16, 64, 0.1, False),
    ],
)
def test_flash_attention_is_asked_only_for_what_it_can(dtype, width, dropout, can):
    assert varlen_can(torch.zeros(2, 1, width, dtype=dtype, device="cuda"), dropout) == can


def packed_on_gpu(lengths, seed=0):
    """Queries, keys and values of 9 and 3 heads of 64 in bf16, and where the documents begin."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randn(sum(lengths), heads, 64, generator=generator)
        .to("cuda", torch.bfloat16)
        .requires_grad_()
        for heads in (9, 3, 3)
    ]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return inputs, packed


def attend(attention, inputs, packed):
    return attention(*inputs, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[64, 64], [1, 130, 2, 300], [512]], ids=str)
def test_flash_attention_within_documents_is_the_loop_over_documents(attention, lengths):
    inputs, packed = packed_on_gpu(lengths)
    together = with_gradients(attend(attention, inputs, packed), inputs)
    one_by_one = attention._one_by_one(*inputs, packed.cu_seqlens_q.tolist())
    expected = with_gradients(one_by_one, inputs)
    for got, want in zip(together, expected, strict=True):
        assert got.dtype == torch.bfloat16
        # Both round to 2^-8 what they sum in fp32, in other tiles, and the probabilities too.
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
def test_no_bit_of_a_document_depends_on_another(attention):
    inputs, packed = packed_on_gpu([100, 30, 250])
    before = attend(attention, inputs, packed)
    with torch.no_grad():
        for x in inputs:
            x[110] += 1
    after = attend(attention, inputs, packed)
    differ = (before != after).any(-1).nonzero().flatten().tolist()
    assert differ == list(range(110, 130))


@pytest.mark.gpu
def test_no_document_makes_the_host_wait(attention):
    inputs, packed = packed_on_gpu([100, 30, 250])
    attend(attention, inputs, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(attention, inputs, packed).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(4, 2, 24), (1, 1, 24), (7, 3, 24)], ids=str)
def test_the_norm_is_its_definition(shape):
    norm = RMSNorm(config=transformer_config(SHAPE, norm_epsilon=1e-5), hidden_size=24, eps=0.5)
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.5) * norm.weight
    inputs = [x, norm.weight]
    ours, theirs = with_gradients(norm(x), inputs), with_gradients(expected, inputs)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_an_fp32_residual_comes_out_in_the_weights_type():
    config = replace(transformer_config(SHAPE, norm_epsilon=1e-5), params_dtype=torch.bfloat16)
    norm = RMSNorm(config=config, hidden_size=24, eps=1e-5)
    torch.manual_seed(1)
    x = torch.randn(3, 2, 24, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))
    y = norm(x)
    exact = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight.float()
    # Rounded once, from the fp32 result.
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-6)
    y.float().sum().backward()
    assert (x.grad.dtype, norm.weight.grad.dtype) == (torch.float32, torch.bfloat16)
    assert y.dtype == torch.bfloat16


def test_the_norm_is_marked_for_sequence_parallelism():
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    parallel = replace(config, tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(config=parallel, hidden_size=24, eps=1e-5).weight.sequence_parallel
    assert not RMSNorm(config=config, hidden_size=24, eps=1e-5).weight.sequence_parallel


def test_output_projections_start_like_every_other_layer():
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    torch.manual_seed(0)
    std = config.output_layer_init_method(torch.empty(400, 400)).std()
    assert std.item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qk_l2_norm", False),
        ("rotary_interleaved", False),
        ("use_mup", True),
        ("mtp_num_layers", 1),
        ("activation_func", torch.nn.functional.gelu),
        ("activation_func_clamp_value", 7.0),
        ("glu_linear_offset", 1.0),
        ("num_moe_experts", 2),
        ("experimental_attention_variant", "dsa"),
        ("linear_attention_freq", 2),
    ],
)
def test_another_architecture_is_refused(name, value):
    config = transformer_config(SHAPE, norm_epsilon=1e-5)
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        finish(config)
