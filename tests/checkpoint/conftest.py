"""Small models on both sides: a Hugging Face folder, and a run saved by the engine's own writer."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from megatron_mlr1.checkpoint.architecture import Architecture  # noqa: E402
from megatron_mlr1.checkpoint.hugging_face import TokenIds, write_configs  # noqa: E402
from megatron_mlr1.checkpoint.names import places  # noqa: E402
from megatron_mlr1.checkpoint.shards import ShardWriter  # noqa: E402
from megatron_mlr1.checkpoint.tensors import hf_shapes  # noqa: E402
from megatron_mlr1.model.build import build  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=300,
)
PADDED_VOCABULARY = 320
LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return Architecture(shape=SHAPE, rotary_base=50_000.0, max_positions=64, norm_epsilon=1e-5)


@pytest.fixture
def hf_folder(architecture: Architecture, tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of random weights; `max_shard_bytes` spreads them over files."""

    def make(
        name: str = "hf",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_bytes: int = 10**9,
        **more: tuple[int, ...],
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_configs(folder, architecture, TokenIds(None, None), dtype)
        shapes = {
            hf: shape
            for place in places(SHAPE.num_layers)
            for hf, shape in zip(place.hf_names, hf_shapes(place.row, SHAPE), strict=True)
        }
        torch.manual_seed(7)
        with ShardWriter(folder, shapes, dtype, max_shard_bytes=max_shard_bytes) as shards:
            for hf, shape in shapes.items():
                shards.write(hf, torch.randn(shape) * 0.1)
        return folder

    return make


def run_arguments() -> Namespace:
    """Give those of a run's arguments that conversion reads, as the engine names them."""
    return Namespace(
        num_layers=SHAPE.num_layers,
        hidden_size=SHAPE.hidden_size,
        ffn_hidden_size=SHAPE.ffn_hidden_size,
        num_attention_heads=SHAPE.num_attention_heads,
        group_query_attention=True,
        num_query_groups=SHAPE.num_query_groups,
        kv_channels=SHAPE.kv_channels,
        max_position_embeddings=64,
        rotary_base=50_000,
        rotary_percent=1.0,
        rotary_interleaved=True,
        position_embedding_type="rope",
        layernorm_epsilon=1e-5,
        normalization="RMSNorm",
        qk_l2_norm=True,
        qk_layernorm=False,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=False,
        num_experts=None,
        softmax_type="vanilla",
        vocab_size=None,
        padded_vocab_size=PADDED_VOCABULARY,
        make_vocab_size_divisible_by=64,
        tensor_model_parallel_size=1,
        tokenizer_model=None,
    )


def save_run(root: Path, iteration: int, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a random model as the engine does; give its weights by the model's own names."""
    folder = root / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    arguments = Namespace(**(vars(run_arguments()) | changes))
    padded = ModelShape(
        **{name: getattr(SHAPE, name) for name in SHAPE.__slots__ if name != "vocab_size"},
        vocab_size=PADDED_VOCABULARY,
    )
    with one_process(seed=iteration) as groups:
        model = build(padded, groups, rotary_base=50_000.0, max_positions=64)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.1)
        moments = torch.zeros(SHAPE.hidden_size)
        key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
        state = {
            "model": model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}),
            "optimizer": {"exp_avg": ShardedTensor.from_rank_offsets(key, moments)},
            "rng_state": ShardedObject("rng_state", [1], (1, 1), (0, 0)),
            "args": arguments,
            "checkpoint_version": 3.0,
            "iteration": iteration,
        }
        metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Give a run of two saved iterations, and the weights of the latest."""
    root = tmp_path_factory.mktemp("run")
    save_run(root, 3)
    return root, save_run(root, 5)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tokenizer of bytes with Llama 3's special tokens: 256 + 6 tokens, padded to 300."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        additional_special_tokens=list(LLAMA_TOKENS),
    )
    tokenizer.add_tokens([f"<|reserved_{i}|>" for i in range(SHAPE.vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return folder
