"""Proof of a conversion: both models, each loaded by its own library, on the same tokens."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from megatron.core import dist_checkpointing
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mlr1.checkpoint.architecture import Architecture
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.build import build
from megatron_mlr1.model.one_process import one_process

LIMIT: Final = 1e-4
"""Largest relative difference in fp32; two correct implementations differ by about 1e-6."""
NUM_SEQUENCES: Final = 2
LENGTH_TOKENS: Final = 128
SEED: Final = 1234


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the logits of two models are apart."""

    largest: float
    """Largest absolute difference of one logit."""
    relative: float
    """That difference as a share of the largest absolute logit."""

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.2e}, relative {self.relative:.2e} "
            f"(limit {LIMIT:.0e})"
        )


def compare(megatron: Path, hugging_face: Path, architecture: Architecture) -> Difference:
    """Run both models in fp32 and compare their logits.

    Where the Hugging Face weights are stored in bf16, Megatron's are rounded to bf16 first.

    Args:
        megatron: an `iter_*` or `release` folder.
        hugging_face: a model folder.
        architecture: the numbers of both.

    Raises:
        CheckpointError: they differ by more than `LIMIT`, or transformers misses a weight.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = (NUM_SEQUENCES, min(LENGTH_TOKENS, architecture.max_positions))
    ids = torch.randint(architecture.shape.vocab_size, size, generator=generator)
    theirs = _hugging_face_logits(hugging_face, ids)
    is_rounded = json.loads((hugging_face / "config.json").read_text("utf-8")).get("torch_dtype")
    ours = _megatron_logits(megatron, architecture, ids, round_to_bf16=is_rounded == "bfloat16")
    largest = (ours - theirs).abs().max().item()
    difference = Difference(largest, largest / theirs.abs().max().item())
    # Written so that a NaN fails.
    if not difference.relative <= LIMIT:
        raise CheckpointError(
            f"The converted model does not compute what the other computes: {difference}. The "
            "output was not kept; please report this with both configs."
        )
    return difference


def _hugging_face_logits(folder: Path, ids: Tensor) -> Tensor:
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(
                f"{folder}: transformers reports {kind.replace('_', ' ')}: {sorted(info[kind])}. "
                "The folder must hold exactly the model's weights; please report this with its "
                "config."
            )
    with torch.no_grad():
        logits: Tensor = model.float().to("cuda").eval()(ids.to("cuda")).logits
    return logits.cpu()


def _megatron_logits(
    folder: Path, architecture: Architecture, ids: Tensor, *, round_to_bf16: bool
) -> Tensor:
    """Give [B, S, V]; without CUDA, CPU mode reads "cuda" as the CPU."""
    with one_process() as groups, torch.no_grad():
        model = build(
            architecture.shape,
            groups,
            rotary_base=architecture.rotary_base,
            max_positions=architecture.max_positions,
            norm_epsilon=architecture.norm_epsilon,
        )
        wanted: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        loaded = dist_checkpointing.load({"model": wanted}, str(folder))["model"]
        model.load_state_dict(loaded)
        if round_to_bf16:
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        positions = torch.arange(ids.size(1)).expand_as(ids)
        model.to("cuda").eval()
        logits: Tensor = model(ids.to("cuda"), positions.to("cuda"), None)
        return logits.cpu()
