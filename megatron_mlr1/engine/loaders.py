"""Our own order of samples as the engine's data loaders: the provider of `--mlr1-dataset mlr1`."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_mlr1 import cpu
from megatron_mlr1.data.dali import DaliLoader
from megatron_mlr1.data.feed import Feed, Reading, open_feed
from megatron_mlr1.data.index import bin_path
from megatron_mlr1.data.loader import Loader, Turns
from megatron_mlr1.data.mixture import Blend, ResolvedCorpus
from megatron_mlr1.data.splits import NAMES, Share
from megatron_mlr1.engine.admission import admit_all, refuse_documents, warn_of_order
from megatron_mlr1.engine.agreement import agreed
from megatron_mlr1.engine.datasets import Splits, dataset_config
from megatron_mlr1.engine.distillation import Distilling
from megatron_mlr1.engine.groups import Place, place
from megatron_mlr1.errors import ConfigError, DataError
from megatron_mlr1.options import Mlr1Options


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Training, validation or test samples of a run."""

    name: str
    blends: tuple[Blend, ...]
    share: Share
    consumed: int
    """Samples that the run consumed of it."""
    micro_batch: int


class Loaders:
    """Opens the loaders when the engine asks, and remembers how to count corpora."""

    is_distributed = True
    """Tells the engine to call on every process."""

    def __init__(
        self,
        args: Namespace,
        options: Mlr1Options,
        blends: Sequence[Blend],
        distilling: Distilling | None = None,
    ) -> None:
        """Take the engine's arguments, ours, and the corpora of the run's mixtures.

        Args:
            args: validated; read again at the call, when a checkpoint has set what was consumed.
            options: our own.
            blends: empty where the engine's flags name the corpora.
            distilling: the teacher's part, which is opened before the first loader.
        """
        self._distilling = distilling
        self._args = args
        self._options = options
        self._blends = tuple(blends)
        self.count: Feed | None = None

    def __call__(self, sizes: Sequence[int], vp_stage: int | None = None) -> Splits:
        """Open loaders of training, validation and test samples.

        Args:
            sizes: how many samples the engine wants of each; 0 where it wants none. The loaders
                have no end, so more is not asked of them.
            vp_stage: stage of this process that the loaders are for, where it has several.

        Raises:
            DataError: a corpus cannot be read or is not what the run needs; on every process.
            MachineError: the loader that was asked for is not installed.
            Mlr1Error: the teacher of the run is not there or not the right one.
        """
        here = place(vp_stage)
        if self._distilling is not None:
            self._distilling.open()
        return agreed(lambda: self._open(sizes, here))

    def _open(self, sizes: Sequence[int], here: Place) -> Splits:
        config = dataset_config(self._args)
        parts = self._parts(sizes, config)
        blends = [blend for part in parts if part is not None for blend in part.blends]
        prefixes = list(dict.fromkeys(str(c.prefix) for blend in blends for c in blend.corpora))
        refuse_documents(prefixes, self._options)
        admit_all(prefixes, self._args, self._options.verify_data, config.tokenizer)
        if torch.distributed.get_rank() == 0:
            warn_of_order(prefixes)
        reads = here.reads_data(packed=self._args.dataloader_inter_document_masking)
        if not reads and not here.is_reporter:
            return None, None, None
        feeds = [None if part is None else self._feed(part, config) for part in parts]
        if here.is_reporter:
            self.count = feeds[0]
        return tuple(
            None if part is None or feed is None or not reads else self._loader(feed, part, here)
            for part, feed in zip(parts, feeds, strict=True)
        )

    def _parts(self, sizes: Sequence[int], config: GPTDatasetConfig) -> list[_Part | None]:
        args = self._args
        blends = self._blends_of_parts(config)
        shares = [(0.0, 1.0)] * 3 if config.blend_per_split is not None else config.split_matrix
        consumed = (args.consumed_train_samples, args.consumed_valid_samples, 0)
        micro_batch = (args.micro_batch_size, *[args.eval_micro_batch_size] * 2)
        parts: list[_Part | None] = []
        for i, name in enumerate(NAMES):
            share, of_part = shares[i], blends[i]
            nothing = share is None or not of_part
            # The engine asks for test samples in any case, and goes without where there are none.
            if sizes[i] == 0 or (nothing and name == "test"):
                parts.append(None)
                continue
            if share is None or not of_part:
                raise DataError(
                    f"The run reads {name} samples, and --split or the paths by hand leave none "
                    "for it. Give it a share, such as --split 90,10,0, or --eval-iters 0 for no "
                    "evaluation."
                )
            parts.append(
                _Part(
                    name=name,
                    blends=of_part,
                    share=share,
                    consumed=consumed[i],
                    micro_batch=micro_batch[i],
                )
            )
        return parts

    def _blends_of_parts(self, config: GPTDatasetConfig) -> list[tuple[Blend, ...]]:
        """Say which corpora each part reads; evaluation stays with the first mixture."""
        if self._blends:
            return [self._blends, self._blends[:1], self._blends[:1]]
        if config.blend_per_split is not None:
            return [_by_hand(blend) for blend in config.blend_per_split]
        return [_by_hand(config.blend)] * 3

    def _feed(self, part: _Part, config: GPTDatasetConfig) -> Feed:
        args = self._args
        masked = args.dataloader_inter_document_masking
        feed = open_feed(
            part.blends,
            part.share,
            Reading(
                seq_length=args.seq_length,
                seed=args.seed,
                end=config.tokenizer.eod if masked else None,
                num_ids=args.padded_vocab_size,
            ),
        )
        if feed.keeps_documents_apart and not masked:
            raise ConfigError(
                "The corpora hold packed chats, which are always kept apart. Add --document-mask."
            )
        return feed

    def _loader(self, feed: Feed, part: _Part, here: Place) -> Iterator[Any]:
        turns = Turns(
            consumed=part.consumed,
            rank=here.data_rank,
            num_ranks=here.num_data_ranks,
            micro_batch=part.micro_batch,
        )
        device = None if cpu.is_active() else torch.cuda.current_device()
        loader: Loader | DaliLoader
        loader = Loader(feed, turns, self._args.seq_length, device=device)
        if self._options.loader != "thread":
            loader = DaliLoader(loader, part.micro_batch, device=device)
        learns = self._distilling is not None and part.name == NAMES[0] and here.is_last_stage
        return self._distilling.ahead(loader) if self._distilling and learns else loader


def _by_hand(blend: tuple[list[str], list[float] | None] | None) -> tuple[Blend, ...]:
    """Take the corpora that the engine's flags name; without weights each has its bytes'."""
    if blend is None:
        return ()
    prefixes, weights = blend
    if weights is None:
        weights = [float(_num_bytes(prefix)) for prefix in prefixes]
    corpora = tuple(
        ResolvedCorpus(name=Path(prefix).name, weight=weight, prefix=Path(prefix))
        for prefix, weight in zip(prefixes, weights, strict=True)
    )
    return (Blend(first_sample=0, corpora=corpora),)


def _num_bytes(prefix: str) -> int:
    try:
        return bin_path(prefix).stat().st_size
    except OSError as error:
        raise DataError(
            f"{prefix}.bin cannot be read ({error.strerror}). Name a corpus that is there, without "
            ".bin and .idx."
        ) from error
