"""The losses of a linear head by their definitions: whole logits, log-softmax, autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Case:
    """Inputs of a loss; `num_ids` of the rows of both heads exist, the rest is padding."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    ce_weight: Tensor
    kd_weight: Tensor
    num_ids: int


def case(*, tokens=23, ids=61, padding=3, width=12, teacher_width=20, seed=0):
    """Random inputs in float64; some tokens count for one part of the loss alone, some for none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ce_weight, kd_weight = torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    ce_weight[::5], kd_weight[::3] = 0, 0
    return Case(
        hidden=normal(tokens, width),
        weight=normal(ids + padding, width),
        teacher_hidden=normal(tokens, teacher_width),
        teacher_weight=normal(ids + padding, teacher_width),
        labels=torch.randint(0, ids, (tokens,), generator=generator),
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        num_ids=ids,
    )


def logits(hidden, weight, num_ids):
    """Logits in which padded ids have no probability."""
    z = hidden @ weight.T
    padding = torch.arange(weight.size(0)) >= num_ids
    return z.masked_fill(padding, float("-inf"))[:, :num_ids]


def divergence(z, t, direction="forward", temperature=1.0, beta=0.5):
    """The divergence of each row."""
    log_q, log_p = (z / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    if direction == "forward":
        return (p * (log_p - log_q)).sum(1)
    if direction == "reverse":
        return (q * (log_q - log_p)).sum(1)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(1) + (1 - beta) * (q * (log_q - log_m)).sum(1)


def loss(inputs, hidden, weight, *, z_loss=0.0, **objective):
    """The whole weighted sum; without `objective`'s words, the cross-entropy's part alone."""
    z = logits(hidden, weight, inputs.num_ids)
    cross_entropy = functional.cross_entropy(z, inputs.labels, reduction="none")
    total = inputs.ce_weight * (cross_entropy + z_loss * z.logsumexp(1) ** 2)
    if objective:
        t = logits(inputs.teacher_hidden, inputs.teacher_weight, inputs.num_ids)
        scale = objective["temperature"] ** 2
        total = total + inputs.kd_weight * scale * divergence(z, t, **objective)
    return total.sum()


def value_and_gradients(inputs, **words):
    """Value and both gradients of `loss`."""
    hidden = inputs.hidden.clone().requires_grad_()
    weight = inputs.weight.clone().requires_grad_()
    total = loss(inputs, hidden, weight, **words)
    return (total.detach(), *torch.autograd.grad(total, (hidden, weight)))
