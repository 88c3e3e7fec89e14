"""From Hugging Face through runs of two layouts and back: every byte is the same.

Two processes load converted weights with the engine's own loader, tensor parallel and pipeline
parallel with a padded vocabulary, and save them with its own writer.
"""

from argparse import Namespace
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import load_file

from megatron_mlr1 import cpu
from megatron_mlr1.model.shape import ModelShape

cpu.activate()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from transformers import Llama4ForCausalLM, Llama4TextConfig  # noqa: E402

from megatron_mlr1.checkpoint.architecture import Architecture  # noqa: E402
from megatron_mlr1.checkpoint.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from megatron_mlr1.checkpoint.hugging_face import TokenIds, config  # noqa: E402
from megatron_mlr1.checkpoint.megatron import MegatronCheckpoint  # noqa: E402
from megatron_mlr1.checkpoint.shards import SINGLE  # noqa: E402
from megatron_mlr1.model.build import transformer_config  # noqa: E402
from megatron_mlr1.model.spec import block_spec  # noqa: E402
from tests.support.world import run_in_world  # noqa: E402

SHAPE: Final = ModelShape(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=300,
)
ROTARY_BASE: Final = 1_000_000
MAX_POSITIONS: Final = 128
PADDED_VOCABULARY: Final = 384
LAYOUTS: Final = {"tp": (2, 1), "pp": (1, 2)}


def load_and_save(folder: Path) -> None:
    """Be one of two ranks: load the release and save it as a run, once in each layout."""
    rank = torch.distributed.get_rank()
    args = MegatronCheckpoint(folder / "megatron", None).args
    for name, (tensor_size, pipeline_size) in LAYOUTS.items():
        parallel_state.initialize_model_parallel(tensor_size, pipeline_size)
        model_parallel_cuda_manual_seed(1 + rank)
        model = _build(tensor_size, pipeline_size)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        metadata = {"dp_cp_group": groups.dp_cp, "singleton_local_shards": False}
        wanted = model.sharded_state_dict(metadata=metadata)
        release = str(folder / "megatron/release")
        model.load_state_dict(dist_checkpointing.load({"model": wanted}, release)["model"])
        target = folder / name / "iter_0000007"
        if rank == 0:
            target.mkdir(parents=True)
            (folder / name / "latest_checkpointed_iteration.txt").write_text("7")
        torch.distributed.barrier()
        state = {
            "model": model.sharded_state_dict(metadata=metadata),
            "args": Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 7,
        }
        dist_checkpointing.save(state, str(target))
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()


def _build(tensor_size: int, pipeline_size: int) -> GPTModel:
    model_config = transformer_config(SHAPE, norm_epsilon=1e-5)
    model_config.tensor_model_parallel_size = tensor_size
    model_config.pipeline_model_parallel_size = pipeline_size
    model_config.pipeline_dtype = torch.float32
    return GPTModel(
        config=model_config,
        transformer_layer_spec=block_spec(model_config, swiglu_kernel="reference"),
        vocab_size=PADDED_VOCABULARY,
        max_sequence_length=MAX_POSITIONS,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=ROTARY_BASE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a model that transformers saved, its conversion, and two runs that started from it."""
    folder = tmp_path_factory.mktemp("conversion")
    architecture = Architecture(
        shape=SHAPE, rotary_base=float(ROTARY_BASE), max_positions=MAX_POSITIONS, norm_epsilon=1e-5
    )
    fields = config(architecture, TokenIds(None, None), torch.float32)
    torch.manual_seed(3)
    Llama4ForCausalLM(Llama4TextConfig(**fields)).save_pretrained(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron", verify=True)
    world = folder / "world"
    world.mkdir()
    run_in_world(2, load_and_save, world, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back_from_any_layout_byte_for_byte(folder: Path, layout: str) -> None:
    run = MegatronCheckpoint(folder / layout, None)
    assert run.embedding_rows == PADDED_VOCABULARY
    report = megatron_to_hf(folder / layout, folder / f"{layout}-hf", verify=True)
    assert report.difference is not None
    assert report.difference.relative < 1e-5
    before, after = (load_file(folder / name / SINGLE) for name in ("hf", f"{layout}-hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
