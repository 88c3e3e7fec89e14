"""Causal attention by torch, for where Transformer Engine is not.

Grouped queries, documents packed into one sequence (thd), and context parallelism. Packed documents
go through flash attention at once on a GPU, and one by one through SDPA elsewhere.

Dimensions: S tokens of this rank, B sequences, H query heads, G key and value heads, D width of a
head, T packed tokens.
"""

from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megatron_mlr1.errors import ConfigError


class CausalAttention(nn.Module):
    """The engine's core-attention interface over `scaled_dot_product_attention`."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attention_type == "self", f"{attention_type}: this model has only self-attention"
        assert pg_collection is not None, "the engine hands its process groups to every attention"
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [S, B, H, D], or [T, H, D] with `packed_seq_params`.
            key: [S, B, G, D], or [T, G, D].
            value: as `key`.
            attention_mask: ignored; the mask is causal, within documents where packed.
            attn_mask_type: ignored likewise.
            attention_bias: must be None.
            packed_seq_params: where the documents of a packed sequence begin.

        Returns:
            [S, B, H * D], or [T, H * D].
        """
        assert attention_bias is None, "this model has no attention bias"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp_group.size() > 1:
            return self._context_parallel(query, key, value)
        out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
        """Attend each query to the keys up to its own place, counted from the end of the keys."""
        heads_per_group = q_BHSD.size(1) // k_BGSD.size(1)
        num_queries, num_keys = q_BHSD.size(2), k_BGSD.size(2)
        grouped = heads_per_group > 1
        if grouped and not (num_queries == num_keys and flash_takes_groups(q_BHSD)):
            # Without this torch would form all S x S scores.
            k_BGSD = k_BGSD.repeat_interleave(heads_per_group, dim=1)
            v_BGSD = v_BGSD.repeat_interleave(heads_per_group, dim=1)
            grouped = False
        mask = None
        if num_queries != num_keys:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHSD.device)
            mask = ones.tril(diagonal=num_keys - num_queries)
        return scaled_dot_product_attention(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=grouped,
        )

    def _packed(
        self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """Attend within each document, as if each stood alone in its batch."""
        if self.cp_group.size() > 1:
            raise ConfigError(
                "Document masking with context parallelism needs Transformer Engine's attention, "
                "which is not in use here. Set --context-parallel-size 1, or leave out "
                "--dataloader-inter-document-masking."
            )
        dropout = self.dropout if self.training else 0.0
        if varlen_can(q_THD, dropout) and packed.max_seqlen_q is not None:
            out_THD = varlen_attn(
                q_THD,
                k_TGD,
                v_TGD,
                packed.cu_seqlens_q,
                packed.cu_seqlens_kv,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                scale=self.softmax_scale,
                window_size=(-1, 0),
            )
            assert isinstance(out_THD, Tensor), "varlen_attn was not asked for more"
            return out_THD.flatten(1)
        return self._one_by_one(q_THD, k_TGD, v_TGD, packed.cu_seqlens_q.tolist())

    def _one_by_one(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, bounds: list[int]) -> Tensor:
        documents = [
            self._attend(
                *(x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TGD, v_TGD))
            )
            for start, end in pairwise(bounds)
            if end > start
        ]
        return torch.cat(documents, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _context_parallel(self, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        """Gather keys and values of the group; attend with this rank's two runs of queries.

        The engine cuts a sequence into 2 * size chunks and gives rank r the chunks r and
        2 * size - 1 - r, so that all ranks have like work.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        k_BGSD, v_BGSD = (self._whole_sequence(x).permute(1, 2, 0, 3) for x in (k_SBGD, v_SBGD))
        outs = []
        for chunk, q_chunk in zip((rank, 2 * size - 1 - rank), q_SBHD.chunk(2), strict=True):
            num_keys = (chunk + 1) * q_chunk.size(0)
            q_BHSD = q_chunk.permute(1, 2, 0, 3)
            outs.append(self._attend(q_BHSD, k_BGSD[:, :, :num_keys], v_BGSD[:, :, :num_keys]))
        return torch.cat(outs, dim=2).permute(2, 0, 1, 3).flatten(2)

    def _whole_sequence(self, x_SBGD: Tensor) -> Tensor:
        """Gather a sequence from the ranks of the group into its own order."""
        size = self.cp_group.size()
        gathered = gather_from_sequence_parallel_region(
            x_SBGD, tensor_parallel_output_grad=True, group=self.cp_group
        )
        chunks = gathered.chunk(2 * size)
        return torch.cat(
            [chunks[2 * rank] for rank in range(size)]
            + [chunks[2 * rank + 1] for rank in reversed(range(size))]
        )


def flash_takes_groups(q_BHSD: Tensor) -> bool:
    """Whether a kernel of `scaled_dot_product_attention` takes grouped queries as they are.

    Flash attention on CUDA does, without a mask and for 16-bit numbers; the CPU's does not, nor
    does the one of CUDA that is left for a mask or for fp32.
    """
    return q_BHSD.is_cuda and q_BHSD.dtype in (torch.bfloat16, torch.float16)


def varlen_can(q_THD: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention takes packed documents of these queries.

    Its kernels are for 16-bit numbers, heads of 8, 16, .. 256, and GPUs from Ampere on; they take
    grouped queries, and torch asks them for no dropout.
    """
    return (
        q_THD.is_cuda
        and q_THD.dtype in (torch.bfloat16, torch.float16)
        and q_THD.size(-1) % 8 == 0
        and q_THD.size(-1) <= 256
        and dropout == 0.0
        and torch.cuda.get_device_capability(q_THD.device) >= (8, 0)
    )
