"""The loop over chunks of tokens that every loss on a linear head shares.

For each chunk of C tokens: logits = hidden @ weight^T in fp32, a loss that overwrites them with
its gradient, and the two products that carry this gradient on:

    d hidden  = gradient @ weight           d weight += gradient^T @ hidden

So the gradient is made in the forward, 6 d V operations a token, and never more than one chunk of
logits is alive. The chunks follow one another in a fixed order and nothing is added atomically:
the same inputs in the same chunks give the same bits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlr1.ops.wide_matmul import add_to_weight, back_to_hidden, logits_into, wide_dtype

LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Memory of one chunk of fp32 logits, by kind of device. A GPU wants 2,048 rows and more at
128k ids, where the weight's traffic no longer counts; a CPU's products are saturated by a few
hundred rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Which tokens take part, and how many at a time."""

    rows: Tensor | None = None
    """Indices of the tokens that take part, int64, ascending; None means all of them."""

    size: int | None = None
    """Tokens in a chunk; None fills `LOGIT_BYTES`."""


ALL_TOKENS = Chunks()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which gradients are made."""

    hidden: bool = True
    weight: bool = True


BOTH_GRADIENTS = Wanted()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadGradients:
    """Gradients of the weighted sum of a loss over tokens; None where none was wanted."""

    hidden: Tensor | None
    """[N, D] in the wide type: over this shard of the vocabulary alone."""

    weight: Tensor | None
    """[V, D] in the wide type; padded rows have zeros."""


def nothing_across(tensor: Tensor) -> None:
    """Leave a tensor as it is: the only shard of a vocabulary has nobody to ask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The ids of the vocabulary that this device holds, and how it asks the holders of others."""

    first_id: int
    """Id of the weight's first row."""

    num_ids: int
    """Ids in this shard. Rows of the weight behind them are padding: they have no logits, so they
    take no probability, and their gradient is zero."""

    max_across: Callable[[Tensor], None] = nothing_across
    """Puts the largest value among all shards into each element, in place."""

    sum_across: Callable[[Tensor], None] = nothing_across
    """Puts the sum over all shards into each element, in place."""

    def local(self, ids: Tensor) -> Tensor:
        """Turn ids into columns of this shard's logits; -1 for an id of another shard."""
        columns = ids - self.first_id
        return columns.masked_fill((columns < 0) | (columns >= self.num_ids), -1)


def chunk_size(num_ids: int, device: torch.device, dtype: torch.dtype) -> int:
    """Give the tokens whose logits fill `LOGIT_BYTES`, a multiple of 128 where there are many."""
    fit = LOGIT_BYTES.get(device.type, 2**30) // (max(num_ids, 1) * wide_dtype(dtype).itemsize)
    return max(fit // 128 * 128, min(fit, 128), 1)


def run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    shard: Shard,
    chunks: Chunks,
    wanted: Wanted,
    gradient_in_place: Callable[[Tensor, Tensor | slice], None],
) -> HeadGradients:
    """Run a loss over all tokens, chunk after chunk.

    Args:
        hidden_ND: hidden states, in the type of the weight; only read.
        weight_VD: the head's rows of this shard, padding included; only read.
        shard: which ids those are.
        chunks: which tokens, how many at a time.
        wanted: which gradients.
        gradient_in_place: takes logits [C, num_ids] in the wide type and the place of these tokens
            among all N, and overwrites the logits with the gradient of the loss.
    """
    dtype = wide_dtype(weight_VD.dtype)
    used_VD = weight_VD[: shard.num_ids]
    count = hidden_ND.size(0) if chunks.rows is None else chunks.rows.size(0)
    size = min(chunks.size or chunk_size(shard.num_ids, hidden_ND.device, dtype), max(count, 1))
    logits_CV = torch.empty(size, shard.num_ids, dtype=dtype, device=hidden_ND.device)
    grad_ND = torch.zeros_like(hidden_ND, dtype=dtype) if wanted.hidden else None
    grad_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted.weight else None
    for begin in range(0, count, size):
        end = min(begin + size, count)
        place = slice(begin, end) if chunks.rows is None else chunks.rows[begin:end]
        chunk_CD, chunk_CV = hidden_ND[place], logits_CV[: end - begin]
        logits_into(chunk_CV, chunk_CD, used_VD)
        gradient_in_place(chunk_CV, place)
        if grad_ND is not None:
            grad_ND[place] = back_to_hidden(chunk_CV, used_VD)
        if grad_VD is not None:
            add_to_weight(grad_VD[: shard.num_ids], chunk_CV, chunk_CD)
    return HeadGradients(hidden=grad_ND, weight=grad_VD)


ROW_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""What the rows of one block of a definition in plain torch take: on a CPU a share of the
second-level cache, on a GPU enough to fill it."""


def row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Yield the rows of a chunk, in the blocks in which a definition in plain torch takes them.

    Such a definition is several calls, each of which makes a tensor of its argument's size; in
    blocks these stay small.
    """
    row = max(logits_CV.size(1) * logits_CV.element_size(), 1)
    step = max(ROW_BLOCK_BYTES.get(logits_CV.device.type, 2**28) // row, 1)
    for begin in range(0, logits_CV.size(0), step):
        yield slice(begin, begin + step)
