"""One micro-batch through the model: from the loader's batch to the loss."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
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
from megatron_mlr1.engine.distillation import Distilling
from megatron_mlr1.engine.groups import Place, place
from megatron_mlr1.losses.language_model import MicroBatchLoss
from megatron_mlr1.model.head_kernels import HeadKernels
from megatron_mlr1.model.loss_head import LossHead, Teacher
from megatron_mlr1.teacher.lookahead import Ahead

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
Batch = dict[str, Tensor | None]
Read = dict[str, Any] | Ahead[dict[str, Any]]
"""What a loader gives: a batch, in a distilled run together with its place in the queue."""


class ForwardStep:
    """What the engine's schedules call for each micro-batch."""

    def __init__(
        self,
        args: Namespace,
        kernels: HeadKernels,
        distilling: Distilling | None = None,
        *,
        foresees: bool = False,
    ) -> None:
        """Take what does not change between micro-batches.

        Args:
            args: the engine's, validated.
            kernels: of output layer and loss.
            distilling: the teacher's part in the run.
            foresees: whether the head's gradient joins the main gradient in the forward, see
                `foresees_backward`.
        """
        self._args = args
        self._kernels = kernels
        self._distilling, self._foresees = distilling, foresees
        self._places: dict[int | None, Place] = {}
        self._head: LossHead | None = None

    def __call__(
        self, data_iterator: Iterator[Read], model: torch.nn.Module
    ) -> tuple[Tensor | MicroBatchLoss, Callable[[MicroBatchLoss], Loss]]:
        """Run one micro-batch; give the stage's output, and how to hand on the last one's loss.

        Args:
            data_iterator: loader of this process; unused where another one reads for it.
            model: this stage, in the engine's wrappers.
        """
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        if vp_stage not in self._places:
            self._places[vp_stage] = place(vp_stage)
        here = self._places[vp_stage]
        read = self._read(data_iterator, here)
        batch, packed = self._batch(read, here, evaluates=not model.training)
        words: dict[str, Any] = {}
        if here.is_last_stage:
            words["output_processor"] = self._loss_head(model)
            if self._distilling is not None and model.training:
                ahead = read if isinstance(read, Ahead) else None
                lesson = self._distilling.lesson(ahead, batch["rows"], here)
                words["output_processor_context"] = lesson
        output = model(
            batch.get("tokens"),
            batch.get("position_ids"),
            None,
            labels=batch.get("labels"),
            loss_mask=batch.get("loss_mask"),
            packed_seq_params=packed,
            **words,
        )
        return output, self._loss

    def _loss_head(self, model: torch.nn.Module) -> LossHead:
        """Make the head once the model and the teacher are there."""
        if self._head is None:
            distilling = self._distilling
            self._head = LossHead(
                get_attr_wrapped_model(model, "config"),
                vocab_size=self._args.padded_vocab_size,
                kernels=self._kernels,
                teacher=None
                if distilling is None
                else Teacher(num_ids=distilling.num_ids, weight=distilling.head),
                num_micro_batches=get_num_microbatches if self._foresees else None,
            )
        return self._head

    def _read(self, data_iterator: Iterator[Read], here: Place) -> Read:
        """Take a batch from the loader, where this process has one."""
        if here.reads_data(packed=self._args.dataloader_inter_document_masking):
            return next(data_iterator)
        return {}

    def _batch(
        self, read: Read, here: Place, *, evaluates: bool
    ) -> tuple[Batch, PackedSeqParams | None]:
        """Share a batch in the tensor-parallel group, and cut it for context parallelism."""
        args = self._args
        masked = args.dataloader_inter_document_masking
        if not here.is_end and not masked:
            return {}, None
        batch = self._shared(read.batch if isinstance(read, Ahead) else read, here, evaluates)
        packed = _packed(batch, args.seq_length) if masked else None
        if not here.is_end:
            return {}, packed
        if here.is_last_stage and self._distilling is not None:
            labels = batch["labels"]
            assert labels is not None, "the last stage has labels"
            # Cut as all else, it says which of the micro-batch's tokens are here.
            batch["rows"] = torch.arange(labels.numel(), device=labels.device).view_as(labels)
        batch = get_batch_on_this_cp_rank(
            batch,
            is_hybrid_cp=False,
            cp_group=here.context_group,
            use_per_sequence_balancing=masked,
        )
        return batch, packed

    def _shared(self, whole: dict[str, Any], here: Place, evaluates: bool) -> Batch:
        """Bring a batch to the devices of the tensor-parallel group, packed into one sequence.

        A process that shares with nobody packs on the host, which is where it counts documents:
        on the device each count would wait for the micro-batch before.
        """
        args = self._args
        alone = here.tensor_group.size() == 1
        if alone:
            whole = flatten_batch_for_packed_sequences(dict(whole))
        batch: Batch = get_batch_on_this_tp_rank(
            on_device(whole) if here.tensor_rank == 0 else {},
            has_cu_seqlens=args.dataloader_inter_document_masking and not alone,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=False,
            broadcast_src_rank=here.tensor_source,
            broadcast_group=here.tensor_group,
            cp_size=args.context_parallel_size,
            tp_rank=here.tensor_rank,
            micro_batch_size=args.eval_micro_batch_size if evaluates else args.micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=False,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=here.is_first_stage,
            is_pipeline_last_stage=here.is_last_stage,
        )
        if alone:
            return {**batch, "max_seqlen": whole.get("max_seqlen")}
        packed: Batch = flatten_batch_for_packed_sequences(batch)
        return packed

    def _loss(self, done: MicroBatchLoss) -> Loss:
        """Have the engine judge the sum of a micro-batch before it spreads."""
        total = done.total
        # The schedules divide the loss in place, and a rerun is compared with what was kept of it.
        judged = total.detach().clone()
        rerun = get_rerun_state_machine()
        if self._args.check_for_nan_in_loss_and_grad:
            for test, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                rerun.validate_result(
                    result=judged,
                    rejection_func=test,
                    message=f"{name} in the loss of this process",
                    tolerance=0.0,
                    fatal=True,
                )
        if self._args.check_for_spiky_loss:
            rerun.validate_result(
                result=judged,
                rejection_func=partial(
                    rerun.is_unexpectedly_large, threshold=SPIKE, context="loss"
                ),
                message="spike in the loss of this process",
                tolerance=0.0,
                fatal=False,
            )
        return total, done.tokens, done.report


def foresees_backward(args: Namespace) -> bool:
    """Say whether the head may add its gradient to the main gradient before the backward.

    Not where somebody else uses that memory between forward and backward (parameters that are
    gathered into gradient buffers), nor in fp16, whose loss scale would take the head's gradient
    out of its range.
    """
    return not (
        args.fp16
        or args.reuse_grad_buf_for_mxfp8_param_ag
        or args.use_layer_wise_distributed_optimizer
    )


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
