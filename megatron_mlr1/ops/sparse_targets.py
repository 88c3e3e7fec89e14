r"""Sparse targets: a few ids of the teacher's distribution p in place of all of it.

    top_k        the k likeliest ids with their p, and what is left as one number ("tail bucket").
                 Biased: the tail is not ranked. For comparison with systems that have no other.
    systematic   n ids at the points (j + u) / n of the cumulated p, one offset u a token, weight
                 1 / n each: an id comes floor(n p) or ceil(n p) times, n p times on average.
    hybrid       the k likeliest ids exactly, and n systematic ones from the rest, each with weight
                 (mass of the rest) / n.

The last two are unbiased: the mean of the weight that an id gets is its p, so the mean of the
gradient is the full teacher's. (Systematic sampling: Madow and Madow 1944; that sampling beats
truncation: Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870.)

The offsets come from a counter: Philox (Salmon et al. 2011) keyed by the 128-bit content key of
the sequence, its counter set by the seed and the token's place. So the same target results
wherever, whenever and in whatever batch it is made from the same logits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_mlr1.ops.head_chunks import chunk_size, row_blocks
from megatron_mlr1.ops.linear_kl import Head
from megatron_mlr1.ops.wide_matmul import wide_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseForm:
    """Which sparse target."""

    top: int
    """Ids that are kept exactly."""

    points: int
    """Ids that are sampled from the rest; 0 leaves the rest as a tail bucket."""

    temperature: float = 1.0
    """Of the distribution that is kept."""

    @property
    def tail_is_bucket(self) -> bool:
        """Whether all ids that are not kept count as one event."""
        return self.points == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """Targets of N tokens with K = top + points ids each."""

    form: SparseForm

    ids: Tensor
    """[N, K] int64. An id may come more than once: its weights add up."""

    weights: Tensor
    """[N, K]: what each id has of the target; in the sampled forms they sum to 1."""

    tail: Tensor
    """[N]: probability of all other ids together, as one event; zero in the sampled forms."""

    entropy: Tensor
    """[N]: of the whole teacher distribution, in nats; of the k + 1 events in a tail bucket."""


def offsets(content_key: bytes, seed: int, first: int, count: int) -> Tensor:
    """Give one number of [0, 1) for each token of a sequence, fp64 on the CPU.

    Args:
        content_key: 16 bytes that name the sequence.
        seed: another seed gives other targets of the same sequence; 0 to 2^64 - 1.
        first: place of the first token in its sequence.
        count: tokens.
    """
    assert len(content_key) == 16, f"a content key has 16 bytes, not {len(content_key)}"
    # Four numbers a step of the counter, whose lowest word counts and whose third is the seed.
    step, skip = divmod(first, 4)
    counter = np.array([step, 0, seed, 0], dtype=np.uint64)
    stream = np.random.Philox(key=int.from_bytes(content_key, "little"), counter=counter)
    drawn = stream.random_raw(skip + count)[skip:]
    return torch.from_numpy((drawn >> np.uint64(11)) * 2.0**-53)


def sparse_targets(logits_NV: Tensor, offset_N: Tensor, form: SparseForm) -> SparseTargets:
    """Make targets of teacher logits.

    Args:
        logits_NV: fp32 or fp64, over the whole vocabulary; only read.
        offset_N: of `offsets`, on any device.
        form: how many ids, of which kind.
    """
    parts = [_rows(logits_NV[rows], offset_N[rows], form) for rows in row_blocks(logits_NV)]
    return _joined(parts, form)


def sparse_targets_of_head(
    teacher: Head, offset_N: Tensor, form: SparseForm, *, tokens_at_once: int | None = None
) -> SparseTargets:
    """Make targets of hidden states and head, a chunk of tokens at a time.

    Args:
        teacher: hidden states [N, D] and the whole head [V, D].
        offset_N: of `offsets`.
        form: how many ids, of which kind.
        tokens_at_once: tokens whose logits are alive at the same time; None fills a set memory.
    """
    vocabulary, dtype = teacher.weight.size(0), wide_dtype(teacher.weight.dtype)
    size = tokens_at_once or chunk_size(vocabulary, teacher.hidden.device, dtype)
    parts = []
    for begin in range(0, teacher.hidden.size(0), size):
        place = slice(begin, min(begin + size, teacher.hidden.size(0)))
        logits_CV = teacher.hidden.new_empty(place.stop - begin, vocabulary, dtype=dtype)
        teacher.logits_into(logits_CV, place)
        parts.append(sparse_targets(logits_CV, offset_N[place], form))
    return _joined(parts, form)


def _joined(parts: list[SparseTargets], form: SparseForm) -> SparseTargets:
    return SparseTargets(
        form=form,
        ids=torch.cat([part.ids for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        tail=torch.cat([part.tail for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
    )


def _rows(logits_BV: Tensor, offset_B: Tensor, form: SparseForm) -> SparseTargets:
    log_p_BV = (logits_BV.double() / form.temperature).log_softmax(1)
    p_BV = log_p_BV.exp()
    entropy_B = -(log_p_BV * p_BV).sum(1)
    top_BK, id_BK = p_BV.topk(form.top, dim=1)
    p_BV.scatter_(1, id_BK, 0)
    if not form.tail_is_bucket:
        sampled_BP, tail_B = _systematic(p_BV, offset_B.to(p_BV.device), form.points)
        share_BP = (tail_B / form.points)[:, None].expand(-1, form.points)
        id_BK, top_BK = torch.cat((id_BK, sampled_BP), 1), torch.cat((top_BK, share_BP), 1)
        tail_B = torch.zeros_like(tail_B)
    else:
        tail_B = p_BV.sum(1)
        entropy_B = -(torch.xlogy(top_BK, top_BK).sum(1) + torch.xlogy(tail_B, tail_B))
    dtype = logits_BV.dtype
    return SparseTargets(
        form=form,
        ids=id_BK,
        weights=top_BK.to(dtype),
        tail=tail_B.to(dtype),
        entropy=entropy_B.to(dtype),
    )


def _systematic(p_BV: Tensor, offset_B: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Draw ids [B, points] with systematic sampling; give them and the whole mass [B]."""
    cumulated_BV = p_BV.cumsum(1)
    mass_B = cumulated_BV[:, -1].contiguous()
    spots = torch.arange(points, dtype=p_BV.dtype, device=p_BV.device)
    at_BP = (spots + offset_B[:, None]) / points * mass_B[:, None]
    # The last point may be rounded up to the whole mass, which no id reaches beyond.
    at_BP = torch.minimum(at_BP, mass_B.nextafter(torch.zeros_like(mass_B))[:, None])
    id_BP = torch.searchsorted(cumulated_BV, at_BP.contiguous(), right=True)
    return id_BP.clamp_(max=p_BV.size(1) - 1), mass_B
