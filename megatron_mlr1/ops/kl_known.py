"""What sums over rows of logits of student and teacher say of each token.

The sums are those of `mlr1::kl_partials`, of one shard of the vocabulary or of the whole; the
formulas and their names stand in `linear_kl`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLUMNS = (
    "lse",
    "cross_entropy",
    "divergence",
    "teacher_entropy",
    "teacher_cross_entropy",
    "agreement",
    "kl_head",
    "kl_tail",
    "head_mass",
)
"""What is known of each token in the end: log sum exp of z, and the fields of `Distillation`."""


def sums_at(partials_PC: Tensor, tops_2C: Tensor, temperature: float) -> Tensor:
    """Make a shard's sums relative to the tops of all shards, so that theirs may be added.

    Args:
        partials_PC: of `kl_partials`.
        tops_2C: largest z and t of all shards.
        temperature: T.

    Returns:
        [10, C]: the partials behind the tops; the last is 1 where the first of the largest t of all
        shards is here and its z is the largest of all.
    """
    # -inf in a shard without ids: what it would scale is zero there.
    shift_S, shift_T = (partials_PC[:2] - tops_2C).clamp(min=-1e30)
    hot_S, hot_T = (shift_S / temperature).exp(), (shift_T / temperature).exp()
    q, q_hot, p, p_hot, cross_p, cross_q, spread, label, teacher_label, at_top = partials_PC[2:]
    first = (shift_T == 0) & (at_top == tops_2C[0])
    return torch.stack(
        (
            q * shift_S.exp(),
            q_hot * hot_S,
            p * shift_T.exp(),
            p_hot * hot_T,
            cross_p * hot_T,
            cross_q * hot_S,
            (spread + shift_T * p) * shift_T.exp(),
            label,
            teacher_label,
            first.to(label.dtype),
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the sums over a whole vocabulary say of each token, [C] each."""

    lse: Tensor
    """log sum exp of z; the next ones of z / T, of t and of t / T."""

    lse_hot: Tensor
    teacher_lse: Tensor
    teacher_lse_hot: Tensor
    divergence: Tensor
    """D; of the JSD only once its halves are known."""

    centre: Tensor
    """What g takes off."""

    teacher_mean: Tensor
    """Of t under p."""

    label: Tensor
    """z at the label."""

    teacher_label: Tensor
    agreement: Tensor

    @property
    def between(self) -> Tensor:
        """log sum exp of z / T, less that of t / T."""
        return self.lse_hot - self.teacher_lse_hot

    def with_jsd(self, halves_2C: Tensor, beta: float) -> "Known":
        """Give the same with the halves of the JSD over the whole vocabulary."""
        divergence_C = beta * halves_2C[0] + (1 - beta) * halves_2C[1]
        return replace(self, divergence=divergence_C, centre=halves_2C[1])

    def rows_4C(self) -> Tensor:  # noqa: N802  the dimensions
        """Give what `kl_gradient_` needs of them."""
        return torch.stack((self.lse, self.lse_hot, self.teacher_lse_hot, self.centre))

    def weights_3C(self, weights_2C: Tensor, temperature: float, z_loss: float) -> Tensor:  # noqa: N802
        """Give pull, weight and kd for the weights of cross-entropy and divergence."""
        weight, divergence = weights_2C
        pull = torch.where(weight == 0, 0, weight * (1 + 2 * z_loss * self.lse))
        return torch.stack((pull, weight, divergence * temperature))

    def columns(self, split_3C: Tensor) -> Tensor:
        """Give [9, C] in the order of `COLUMNS`; the last three are the split of the gradient."""
        of_row = (
            self.lse,
            self.lse - self.label,
            self.divergence,
            self.teacher_lse - self.teacher_mean,
            self.teacher_lse - self.teacher_label,
            self.agreement,
        )
        return torch.cat((torch.stack(of_row), split_3C))


def known_of(tops_2C: Tensor, sums: Tensor, temperature: float, direction: str) -> Known:
    """Make what is known of the sums of all shards, see `sums_at`."""
    q, q_hot, p, p_hot, cross_p, cross_q, spread, label, teacher_label, firsts = sums
    lse_hot = tops_2C[0] / temperature + q_hot.log()
    teacher_lse_hot = tops_2C[1] / temperature + p_hot.log()
    between = lse_hot - teacher_lse_hot
    cross = cross_p / p_hot + cross_q / q_hot
    divergence = cross - between if direction == "reverse" else cross + between
    return Known(
        lse=tops_2C[0] + q.log(),
        lse_hot=lse_hot,
        teacher_lse=tops_2C[1] + p.log(),
        teacher_lse_hot=teacher_lse_hot,
        divergence=divergence,
        centre=divergence,
        teacher_mean=tops_2C[1] + spread / p,
        label=label,
        teacher_label=teacher_label,
        agreement=firsts.clamp(max=1),
    )
