"""Our model against `transformers`' Llama4ForCausalLM, which the published models run on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.world import run_in_world

PUBLISHED = Path(__file__).parents[1] / "checkpoint" / "mobilellm_r1_140m.json"
LIMIT = 1e-4
TINY = {
    "hidden_size": 128,
    "intermediate_size_mlp": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "layer_types": ["full_attention"] * 4,
    "no_rope_layers": [1] * 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All comparisons, measured in one process: the engine takes seconds to import."""
    published = json.loads(PUBLISHED.read_text())["config"]
    (answer,) = run_in_world(1, measure, tmp_path_factory.mktemp("world"), published)
    return answer


def measure(published: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    answer: dict[str, Any] = {}
    theirs, ours, answer["std"] = pair(published)
    answer["parameters"] = sum(p.numel() for p in ours.parameters())
    answer["published"] = compare(theirs, ours, lengths=[96, 96])
    del theirs, ours
    tiny = published | TINY
    theirs, ours, _ = pair(tiny)
    answer["lengths"] = {n: compare(theirs, ours, lengths=[n] * 3) for n in (1, 7, 64)}
    answer["mixed"] = mixed_lengths(theirs, ours, [5, 64, 17, 1])
    answer["far"] = far_positions(theirs, ours)
    answer["documents"] = documents(ours, [5, 1, 40, 18])
    return answer


def pair(config: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """Both models with the same random weights, in fp32; and the spread that ours started with."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from megatron_mlr1.model.build import build
    from megatron_mlr1.model.shape import ModelShape

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**config)).float()
    shape = ModelShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size_mlp"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        vocab_size=config["vocab_size"],
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ours = build(shape, groups, rotary_base=config["rope_theta"], max_positions=32768)
    std = {n: p.std().item() for n, p in ours.named_parameters() if "norm" not in n}
    copy_weights(theirs, ours, config)
    # Norms away from one, so that a norm left out is seen.
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    copy_norms_back(theirs, ours, config)
    return theirs, ours, std


def rows(config: dict[str, Any]) -> Any:
    """Pairs of (our tensor's name, how to make it of theirs), written out again for the proof."""
    import torch

    groups, width = config["num_key_value_heads"], config["head_dim"]
    yield "embedding.word_embeddings.weight", lambda get: get("model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."

        def qkv(get: Any, theirs: str = theirs) -> Any:
            parts = [get(f"{theirs}self_attn.{x}_proj.weight") for x in "qkv"]
            return torch.cat([p.view(groups, -1, width, p.size(1)) for p in parts], 1).flatten(0, 2)

        def gate_up(get: Any, theirs: str = theirs) -> Any:
            return torch.cat([get(f"{theirs}feed_forward.{x}_proj.weight") for x in ("gate", "up")])

        yield ours + "self_attention.linear_qkv.weight", qkv
        yield ours + "mlp.linear_fc1.weight", gate_up
        for a, b in (
            ("self_attention.linear_proj", "self_attn.o_proj"),
            ("mlp.linear_fc2", "feed_forward.down_proj"),
        ):
            yield ours + a + ".weight", lambda get, name=theirs + b + ".weight": get(name)


def norms(config: dict[str, Any]) -> Any:
    yield "decoder.final_layernorm.weight", "model.norm.weight"
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        yield ours + "input_layernorm.weight", theirs + "input_layernorm.weight"
        yield ours + "pre_mlp_layernorm.weight", theirs + "post_attention_layernorm.weight"


def copy_weights(theirs: Any, ours: Any, config: dict[str, Any]) -> None:
    import torch

    source, target = theirs.state_dict(), dict(ours.named_parameters())
    with torch.no_grad():
        for name, make in rows(config):
            target[name].copy_(make(source.__getitem__))


def copy_norms_back(theirs: Any, ours: Any, config: dict[str, Any]) -> None:
    import torch

    source, target = dict(ours.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for mine, name in norms(config):
            target[name].copy_(source[mine])


def relative(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm())


def compare(theirs: Any, ours: Any, *, lengths: list[int]) -> dict[str, float]:
    """Largest relative error of the logits and of any parameter's gradient, for one loss."""
    import torch

    length = lengths[0]
    config = theirs.config.to_dict()
    ids = torch.randint(0, config["vocab_size"], (len(lengths), length))
    positions = torch.arange(length).expand_as(ids)
    expected = theirs(ids).logits
    got = ours(ids, positions, None)
    weights = torch.randn(len(lengths), length)
    targets = torch.randint(0, config["vocab_size"], ids.shape)
    for model, logits in ((theirs, expected), (ours, got)):
        model.zero_grad(set_to_none=True)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        (losses * weights.flatten()).sum().backward()
    source = {name: p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in ours.named_parameters()}
    errors = {"logits": relative(got.detach(), expected.detach())}
    for name, make in rows(config):
        errors[name] = relative(mine[name], make(source.__getitem__))
    for name, other in norms(config):
        errors[name] = relative(mine[name], source[other])
    assert len(errors) == 1 + len(mine), "a parameter was not compared"
    return errors


def mixed_lengths(theirs: Any, ours: Any, lengths: list[int]) -> float:
    """Logits of sequences of several lengths in one batch, padded on the right."""
    import torch

    longest = max(lengths)
    ids = torch.randint(0, TINY["vocab_size"], (len(lengths), longest))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).logits
        got = ours(ids, torch.arange(longest).expand_as(ids), None)
    return relative(got[mask], expected[mask])


def far_positions(theirs: Any, ours: Any) -> float:
    """Logits of the last of 64 tokens that stand at the end of 32,768 positions."""
    import torch

    start = 32768 - 64
    ids = torch.randint(0, TINY["vocab_size"], (1, 64))
    positions = torch.arange(start, 32768)[None]
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions).logits
        # The model takes no offset, so the end of its table of 32,768 positions is handed in.
        table = ours.rotary_pos_emb(32768)[start:]
        out = ours.decoder(ours.embedding(ids, positions), None, rotary_pos_emb=table)
        got = ours.output_layer(out, weight=ours.shared_embedding_or_output_weight())[0]
    return relative(got.transpose(0, 1), expected)


def documents(ours: Any, lengths: list[int]) -> dict[str, float]:
    """Logits of packed documents against each document alone, and after another one changed."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    ids = torch.randint(0, TINY["vocab_size"], (1, sum(lengths)))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        together = ours(ids, positions, None, packed_seq_params=packed)[0]
        alone = [
            ours(ids[:, a:b], torch.arange(b - a)[None], None)[0]
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        changed = ids.clone()
        changed[0, 2] = (changed[0, 2] + 1) % TINY["vocab_size"]
        leaked = ours(changed, positions, None, packed_seq_params=packed)[0]
    return {
        "alone": relative(together, torch.cat(alone)),
        "leak": float((leaked[lengths[0] :] - together[lengths[0] :]).abs().max()),
        "own": float((leaked[: lengths[0]] - together[: lengths[0]]).abs().max()),
    }


def test_the_published_140m_has_its_parameters(measured):
    assert measured["parameters"] == 140_248_512


def test_all_linear_layers_start_with_the_same_spread(measured):
    assert len(measured["std"]) == 1 + 4 * 15
    assert measured["std"] == pytest.approx(dict.fromkeys(measured["std"], 0.02), rel=0.01)


def test_logits_of_the_published_140m_agree(measured):
    assert measured["published"]["logits"] < LIMIT


def test_every_gradient_of_the_published_140m_agrees(measured):
    assert max(measured["published"].values()) < LIMIT


@pytest.mark.parametrize("length", [1, 7, 64])
def test_sequences_of_any_length_agree(measured, length):
    assert max(measured["lengths"][length].values()) < LIMIT


def test_sequences_of_several_lengths_agree_in_one_batch(measured):
    assert measured["mixed"] < LIMIT


def test_rotary_positions_agree_up_to_32k(measured):
    assert measured["far"] < LIMIT


def test_packed_documents_equal_the_documents_alone(measured):
    assert measured["documents"]["alone"] < 1e-5


def test_no_bit_of_one_document_reaches_another(measured):
    assert measured["documents"]["own"] > 0, "the change was not seen at all"
    assert measured["documents"]["leak"] == 0
