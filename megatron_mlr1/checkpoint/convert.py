"""The two conversions. Each reads, rearranges and writes one weight at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_mlr1.checkpoint.folder import whole_folder
from megatron_mlr1.checkpoint.hugging_face import (
    LLAMA_3_IDS,
    LLAMA_3_VOCABULARY,
    TokenIds,
    read_architecture,
    write_configs,
)
from megatron_mlr1.checkpoint.megatron import MegatronCheckpoint, write_release
from megatron_mlr1.checkpoint.names import ROWS, Place, check_hf_names, places
from megatron_mlr1.checkpoint.shards import ShardReader, ShardWriter
from megatron_mlr1.checkpoint.tensors import check_shape, hf_shapes, merge, split
from megatron_mlr1.checkpoint.tokenizer import Tokenizer, holds_tokenizer, read_tokenizer
from megatron_mlr1.checkpoint.verify import Difference, compare
from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a conversion made."""

    source: Path
    num_parameters: int
    num_bytes: int
    dtype: torch.dtype
    tokenizer: Path | None
    """Where the tokenizer came from; None where there is none."""
    difference: Difference | None
    """What the proof found, where one was asked for."""


def megatron_to_hf(
    load: Path,
    save: Path,
    *,
    iteration: int | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    verify: bool = False,
) -> Report:
    """Export one iteration of a run as a Hugging Face folder.

    Args:
        load: the folder that the run was given as `--save`.
        save: the folder to be made.
        iteration: which one; None is the latest.
        tokenizer: the tokenizer's folder; None takes the run's own where that is a folder.
        dtype: type of the weights.
        max_shard_bytes: size beyond which the weights are spread over several files.
        overwrite: replace what is at `save`.
        verify: compare the logits of both models before the folder gets its name.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture, `save` is occupied,
            or the models differ.
    """
    _check_apart(load, save)
    checkpoint = MegatronCheckpoint(load, iteration)
    folder = tokenizer or checkpoint.tokenizer
    found = read_tokenizer(folder) if folder else None
    vocab_size = _vocabulary(checkpoint, found)
    architecture = checkpoint.architecture(vocab_size)
    shape, ids = architecture.shape, _token_ids(found, vocab_size)
    with whole_folder(save, overwrite=overwrite) as partial:
        write_configs(partial, architecture, ids, dtype)
        if found:
            found.copy(partial)
        shards = ShardWriter(partial, _hf_shapes(shape), dtype, max_shard_bytes=max_shard_bytes)
        with shards:
            for place in _progress(shape, "to Hugging Face"):
                tensors = split(place, checkpoint.reader.read(place), shape)
                for name, tensor in zip(place.hf_names, tensors, strict=True):
                    shards.write(name, tensor)
        difference = compare(checkpoint.folder, partial, architecture) if verify else None
    return Report(
        source=checkpoint.folder,
        num_parameters=shape.num_parameters(),
        num_bytes=shards.num_bytes,
        dtype=dtype,
        tokenizer=folder,
        difference=difference,
    )


def hf_to_megatron(
    load: Path, save: Path, *, overwrite: bool = False, verify: bool = False
) -> Report:
    """Write a Hugging Face model as a checkpoint that a run can start from, in any layout.

    The weights keep their type.

    Args:
        load: a model folder.
        save: the folder to be made, for the engine's `--load` or `--pretrained-checkpoint`.
        overwrite: replace what is at `save`.
        verify: compare the logits of both models before the folder gets its name.

    Raises:
        CheckpointError: the model is damaged or of another architecture, `save` is occupied, or the
            models differ.
    """
    _check_apart(load, save)
    architecture = read_architecture(load)
    shape, weights = architecture.shape, ShardReader(load)
    check_hf_names(weights.names, shape.num_layers, where=str(load))
    for name, expected in _hf_shapes(shape).items():
        check_shape(weights.shape(name), expected, what=f"{load}: {name}")
    weights.check_tied_head()
    dtype = weights.dtype
    tokenizer = load if holds_tokenizer(load) else None
    with (
        whole_folder(save, overwrite=overwrite) as partial,
        _progress(shape, "to Megatron") as progress,
    ):

        def make(place: Place) -> Tensor:
            progress.update()
            return merge(place, tuple(weights.read(name) for name in place.hf_names), shape)

        folder = write_release(partial, architecture, make, dtype=dtype, tokenizer=tokenizer)
        difference = compare(folder, load, architecture) if verify else None
    return Report(
        source=load,
        num_parameters=shape.num_parameters(),
        num_bytes=shape.num_parameters() * dtype.itemsize,
        dtype=dtype,
        tokenizer=tokenizer,
        difference=difference,
    )


def _check_apart(load: Path, save: Path) -> None:
    source, target = load.resolve(), save.resolve()
    if target == source or target in source.parents:
        raise CheckpointError(
            f"{save} is or holds {load}, which is being read; the output must be a folder of its "
            "own. Name another one with --save."
        )


def _hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        name: size
        for place in places(shape.num_layers)
        for name, size in zip(place.hf_names, hf_shapes(place.row, shape), strict=True)
    }


def _progress(shape: ModelShape, what: str) -> "tqdm[Place]":
    """Give the weights in order, with a bar where somebody looks at a terminal."""
    return tqdm(list(places(shape.num_layers)), desc=what, unit="weight", disable=None)


def _vocabulary(checkpoint: MegatronCheckpoint, tokenizer: Tokenizer | None) -> int:
    """Find how many rows of the embedding are tokens: the rest is padding for the run's layout.

    Raises:
        CheckpointError: nothing says how many, or what says it does not fit.
    """
    rows = checkpoint.embedding_rows
    size = checkpoint.recorded_vocabulary or (tokenizer.size if tokenizer else None)
    if size is None:
        if not 0 <= rows - LLAMA_3_VOCABULARY < checkpoint.padding_multiple:
            raise CheckpointError(
                f"{checkpoint.folder}: {ROWS[0].megatron} has {rows} rows, padding included, and "
                "nothing says how many are tokens. Give the run's tokenizer with --tokenizer."
            )
        size = LLAMA_3_VOCABULARY
    if size > rows or (tokenizer and tokenizer.size > rows):
        largest = max(size, tokenizer.size if tokenizer else 0)
        raise CheckpointError(
            f"{checkpoint.folder}: {ROWS[0].megatron} has {rows} rows, but the vocabulary has "
            f"{largest} tokens. The tokenizer must be the one of the run; name it with --tokenizer."
        )
    return size


def _token_ids(tokenizer: Tokenizer | None, vocab_size: int) -> TokenIds:
    if tokenizer:
        return tokenizer.ids
    return LLAMA_3_IDS if vocab_size == LLAMA_3_VOCABULARY else TokenIds(None, None)
