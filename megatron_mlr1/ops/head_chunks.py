"""The loop over chunks of tokens that every loss on a linear head shares.

For each chunk of C tokens: logits = hidden @ weight^T in fp32, a loss that overwrites them with
its gradient, and the two products that carry this gradient on:

    d hidden  = gradient @ weight           d weight += gradient^T @ hidden

So the gradient is made in the forward, 6 d V operations a token, and never more than one chunk of
logits is alive. The chunks follow one another in a fixed order and nothing is added atomically:
the same inputs in the same chunks give the same bits.

What it takes beside hidden states and weight, in bytes, for N tokens of which C are in a chunk:

                              formula                950M, 32,768 tokens, on CUDA
    logits (two of a teacher) C V 4, or C V 2        1.00 GiB  (`LOGIT_BYTES`; C = 2,048)
    d hidden                  N D 2, split: N D 4    0.09 GiB, split: 0.19 GiB
    d weight                  V D 4, or none         0.73 GiB, or none where it is added to a
                                                     main gradient that is there anyway
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlr1.ops.wide_matmul import (
    add_to_weight,
    back_to_hidden,
    gradient_dtype,
    logits_into,
    wide_dtype,
)

LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Memory of one chunk of logits, by kind of device. A GPU wants 2,048 rows and more at
128k ids, where the weight's traffic no longer counts; a CPU's products are saturated by a few
hundred rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Which tokens take part, and how many at a time."""

    rows: Tensor | None = None
    """Indices of the tokens that take part, int64, ascending; None means all of them."""

    size: int | None = None
    """Tokens in a chunk; None fills `LOGIT_BYTES`."""

    logits: torch.dtype | None = None
    """Type in which logits are kept between products and row arithmetic; None means the wide one.
    bf16 halves their traffic and costs a loss over 128k ids about 1e-4 nats a token."""

    def logits_dtype(self, weight: Tensor) -> torch.dtype:
        """Name the type of the logits of a head."""
        return self.logits or wide_dtype(weight.dtype)


ALL_TOKENS = Chunks()


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which gradients are made, and where they go."""

    hidden: bool = True
    weight: bool = True

    factor: Tensor | None = None
    """What both gradients are multiplied by, one element; None for 1."""

    into: Tensor | None = None
    """[V, D] in the wide type: what the weight's gradient is added to; None makes a tensor of
    zeros for it."""

    @property
    def any(self) -> bool:
        """Whether logits are overwritten with a gradient at all."""
        return self.hidden or self.weight

    def weighted(self, weight_C: Tensor) -> Tensor:
        """Give what each token weighs in the gradients, if it weighs so much in the loss."""
        return weight_C if self.factor is None else weight_C * self.factor


BOTH_GRADIENTS = Wanted()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadGradients:
    """Gradients of the weighted sum of a loss over tokens; None where none was wanted."""

    hidden: Tensor | None
    """[N, D]: over this shard of the vocabulary alone. In the type of the hidden states where their
    products have it and no other shard's part is to be added, else in the wide type."""

    weight: Tensor | None
    """[V, D] in the wide type: `Wanted.into`, or new and with zeros in padded rows."""


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

    @property
    def is_whole(self) -> bool:
        """Whether no other device holds ids."""
        return self.max_across is nothing_across

    def local(self, ids: Tensor) -> Tensor:
        """Turn ids into columns of this shard's logits; -1 for an id of another shard."""
        columns = ids - self.first_id
        return columns.masked_fill((columns < 0) | (columns >= self.num_ids), -1)


def chunk_size(num_ids: int, device: torch.device, dtype: torch.dtype) -> int:
    """Give the tokens whose logits fill `LOGIT_BYTES`, a multiple of 128 where there are many."""
    fit = LOGIT_BYTES.get(device.type, 2**30) // (max(num_ids, 1) * dtype.itemsize)
    return max(fit // 128 * 128, min(fit, 128), 1)


def run_chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    shard: Shard,
    chunks: Chunks,
    wanted: Wanted,
    gradient_in_place: Callable[[Tensor, Tensor | slice, torch.dtype], None],
) -> HeadGradients:
    """Run a loss over all tokens, chunk after chunk.

    Args:
        hidden_ND: hidden states, in the type of the weight; only read.
        weight_VD: the head's rows of this shard, padding included; only read.
        shard: which ids those are.
        chunks: which tokens, how many at a time.
        wanted: which gradients.
        gradient_in_place: takes logits [C, num_ids], the place of these tokens among all N, and
            the type of the gradient with which it overwrites the logits, see `rows_in`.
    """
    wide, dtype = wide_dtype(weight_VD.dtype), chunks.logits_dtype(weight_VD)
    inward = gradient_dtype(dtype, hidden_ND)
    to_hidden = inward if inward == hidden_ND.dtype and shard.is_whole else wide
    used_VD = weight_VD[: shard.num_ids]
    count = hidden_ND.size(0) if chunks.rows is None else chunks.rows.size(0)
    size = min(chunks.size or chunk_size(shard.num_ids, hidden_ND.device, dtype), max(count, 1))
    logits_CV = torch.empty(size, shard.num_ids, dtype=dtype, device=hidden_ND.device)
    grad_ND = torch.zeros_like(hidden_ND, dtype=to_hidden) if wanted.hidden else None
    grad_VD = None
    if wanted.weight:
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted.into is None else wanted.into
    for begin in range(0, count, size):
        end = min(begin + size, count)
        place = slice(begin, end) if chunks.rows is None else chunks.rows[begin:end]
        chunk_CD, chunk_CV = hidden_ND[place], logits_CV[: end - begin]
        logits_into(chunk_CV, chunk_CD, used_VD)
        gradient_in_place(chunk_CV, place, inward)
        grad_CV = rows_in(chunk_CV, inward)
        if grad_ND is not None:
            grad_ND[place] = back_to_hidden(grad_CV, used_VD, to_hidden)
        if grad_VD is not None:
            add_to_weight(grad_VD[: shard.num_ids], grad_CV, chunk_CD)
    return HeadGradients(hidden=grad_ND, weight=grad_VD)


def rows_in(logits_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """See the memory of logits as rows of as many elements in `dtype`, which is not wider.

    A gradient that is narrower than its logits fills the first part of each row: element v of row r
    is at [r, v] of what this gives, whose rows lie as far apart as those of the logits. A product
    takes that distance as it is, so nothing is moved.
    """
    if logits_CV.dtype == dtype:
        return logits_CV
    return logits_CV.view(dtype)[:, : logits_CV.size(1)]


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
