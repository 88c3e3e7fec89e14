"""Megatron's own datasets from its arguments, and which corpus each sample came from."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_mlr1.data.feed import are_packs
from megatron_mlr1.data.provenance import read_record
from megatron_mlr1.data.splits import refuse_empty_parts
from megatron_mlr1.engine.admission import admit_all, refuse_documents
from megatron_mlr1.engine.agreement import agreed
from megatron_mlr1.engine.groups import place
from megatron_mlr1.errors import DataError
from megatron_mlr1.options import Mlr1Options

Splits = tuple[Any, ...]
"""Training, validation and test datasets; None on a process that reads none."""


@dataclass
class CorpusCount:
    """How many samples of each corpus the first n samples of a blend hold."""

    names: tuple[str, ...]
    """The corpus of each dataset of the blend; several datasets may share one."""

    which: np.ndarray[Any, Any] | None
    """The dataset of each sample; None where there is one dataset alone."""

    _counted: int = 0
    _counts: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def samples(self, consumed: int) -> dict[str, int]:
        """Count the first `consumed` samples by corpus, in the order of the mixture."""
        if self.which is None:
            return {self.names[0]: consumed}
        if consumed < self._counted or not self._counts.size:
            self._counted, self._counts = 0, np.zeros(len(self.names), dtype=np.int64)
        new = self.which[self._counted : consumed]
        self._counts += np.bincount(new, minlength=len(self.names))
        self._counted = consumed
        totals = dict.fromkeys(self.names, 0)
        for name, count in zip(self.names, self._counts.tolist(), strict=True):
            totals[name] += count
        return totals


class MegatronDatasets:
    """Builds the datasets when the engine asks, and remembers how to count corpora."""

    is_distributed = True
    """Tells the engine to call on every process."""

    def __init__(self, args: Namespace, options: Mlr1Options, corpora: Sequence[str]) -> None:
        """Take the engine's arguments, and the corpus of each prefix in `--data-path`, in order."""
        self._args = args
        self._options = options
        self._corpora = tuple(corpora)
        self.count: CorpusCount | None = None

    def __call__(self, sizes: Sequence[int], vp_stage: int | None = None) -> Splits:
        """Build training, validation and test datasets of the given numbers of samples."""
        here = place(vp_stage)
        kind = MockGPTDataset if self._args.mock_data else GPTDataset
        reads = here.reads_data(packed=self._args.dataloader_inter_document_masking)
        config = dataset_config(self._args)
        if config.blend is not None:
            prefixes = config.blend[0]
            agreed(lambda: self._check(prefixes, config))
            parts = zip(config.split_matrix, sizes, strict=True)
            # Nothing is built of a split of which nothing is asked (--eval-iters 0).
            config.split_matrix = [part if size != 0 else None for part, size in parts]
            refuse_empty_parts(config.blend[0], config.split_matrix)
        try:
            train, valid, test = BlendedMegatronDatasetBuilder(
                kind, list(sizes), lambda: reads or here.is_reporter, config
            ).build()
        except (FileNotFoundError, IndexError) as error:
            raise DataError(f"The datasets cannot be built: {error}") from error
        if here.is_reporter and self._corpora:
            self.count = _counter(train, self._corpora)
        # The engine has no loader for a split without samples, as mock data have.
        built = zip((train, valid, test), sizes, strict=True)
        return tuple(split if reads and size != 0 else None for split, size in built)

    def _check(self, prefixes: Sequence[str], config: GPTDatasetConfig) -> None:
        """Hold the corpora against their records.

        Raises:
            DataError: one is not what its record says, of another tokenizer, or of packs.
        """
        for prefix in prefixes:
            if are_packs(read_record(prefix)):
                raise DataError(
                    f"{prefix} holds packed chats, and Megatron's datasets would train on the "
                    "prompts too. Leave --mlr1-dataset megatron out."
                )
        refuse_documents(prefixes, self._options)
        admit_all(prefixes, self._args, self._options.verify_data, config.tokenizer)


def _counter(train: Any, corpora: tuple[str, ...]) -> CorpusCount | None:
    if isinstance(train, BlendedDataset):
        if len(train.datasets) != len(corpora) or train.dataset_index is None:
            return None
        return CorpusCount(names=corpora, which=train.dataset_index)
    return CorpusCount(names=corpora[:1], which=None)


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Give the configuration of the engine's GPT dataset.

    Raises:
        DataError: the tokenizer has more ids than the model has rows.
    """
    tokenizer = build_tokenizer(args)
    rows = args.padded_vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        raise DataError(
            f"The tokenizer {args.tokenizer_model} has {tokenizer.vocab_size:,} ids and the model "
            f"has {rows:,} rows in its embedding; every id needs a row. Take the tokenizer that "
            "the corpora were made with, or a model with a larger --padded-vocab-size."
        )
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def on_device(batch: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Move a loader's batch to the device; what it lacks is None."""
    return {
        key: batch[key].cuda(non_blocking=True) if batch.get(key) is not None else None
        for key in BATCH_KEYS
    }


BATCH_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)
"""What the engine's batch functions look for."""
