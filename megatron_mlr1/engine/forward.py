"""One micro-batch through the model: from the loader's batch to the loss."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch import Tensor

from megatron_mlr1.engine.datasets import on_device
from megatron_mlr1.engine.groups import Place, place
from megatron_mlr1.losses.language_model import masked_sum

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
Batch = dict[str, Tensor | None]


class ForwardStep:
    """What the engine's schedules call for each micro-batch."""

    def __init__(self, args: Namespace) -> None:
        """Take the engine's validated arguments."""
        self._args = args
        self._places: dict[int | None, Place] = {}

    def __call__(
        self, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """Run one micro-batch; give the stage's output, and how to make a loss of the last one's.

        Args:
            data_iterator: loader of this process; unused where another one reads for it.
            model: this stage, in the engine's wrappers.
        """
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        if vp_stage not in self._places:
            self._places[vp_stage] = place(vp_stage)
        batch, packed = self._batch(data_iterator, self._places[vp_stage])
        output = model(
            batch.get("tokens"),
            batch.get("position_ids"),
            None,
            labels=batch.get("labels"),
            loss_mask=batch.get("loss_mask"),
            packed_seq_params=packed,
        )
        return output, partial(self._loss, batch.get("loss_mask"))

    def _batch(
        self, data_iterator: Iterator[dict[str, Any]], here: Place
    ) -> tuple[Batch, PackedSeqParams | None]:
        """Read a batch, share it in the tensor-parallel group, cut it for context parallelism."""
        args = self._args
        masked = args.dataloader_inter_document_masking
        if not here.is_end and not masked:
            return {}, None
        batch = get_batch_on_this_tp_rank(
            on_device(next(data_iterator)) if here.tensor_rank == 0 else {},
            has_cu_seqlens=masked,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=False,
            broadcast_src_rank=here.tensor_source,
            broadcast_group=here.tensor_group,
            cp_size=args.context_parallel_size,
            tp_rank=here.tensor_rank,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=here.is_first_stage,
            is_pipeline_last_stage=here.is_last_stage,
        )
        batch = flatten_batch_for_packed_sequences(batch)
        packed = _packed(batch, args.seq_length) if masked else None
        if not here.is_end:
            return {}, packed
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=False,
            cp_group=here.context_group,
            use_per_sequence_balancing=masked,
        )
        return batch, packed

    def _loss(self, loss_mask: Tensor | None, losses: Tensor) -> Loss:
        """Reduce the token losses, and have the engine judge the sum before it spreads."""
        assert loss_mask is not None, "only the last stage has losses, and it has their mask"
        total, tokens, report = masked_sum(losses, loss_mask)
        rerun = get_rerun_state_machine()
        if self._args.check_for_nan_in_loss_and_grad:
            for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                rerun.validate_result(
                    result=total,
                    rejection_func=test,
                    message=f"{name} in the loss of this process",
                    tolerance=0.0,
                    fatal=True,
                )
        if self._args.check_for_spiky_loss:
            rerun.validate_result(
                result=total,
                rejection_func=partial(
                    rerun.is_unexpectedly_large, threshold=SPIKE, context="loss"
                ),
                message="spike in the loss of this process",
                tolerance=0.0,
                fatal=False,
            )
        return total, tokens, report


SPIKE = 10.0
"""A loss so many times the largest seen is a spike; the factor of the engine's own GPT script."""


def _packed(batch: Batch, seq_length: int) -> PackedSeqParams:
    """Say where the documents of a packed micro-batch begin, and count their squares for FLOPs."""
    bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
    assert bounds is not None, "document masking asks the dataset for cu_seqlens"
    assert longest is not None, "document masking asks the dataset for max_seqlen"
    bounds = bounds.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(bounds)
    max_length = int(longest.item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max_length,
        max_seqlen_kv=max_length,
        tokens_per_sample=seq_length,
    )
