"""The language-model loss of one micro-batch, as the engine's schedules take it."""

import torch
from torch import Tensor


def masked_sum(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        losses: cross-entropy of each token in nats, any shape.
        loss_mask: 1 where the token counts and 0 where not, as many elements as `losses`.

    Returns:
        the sum in fp32 (scalar); the number of tokens (int32 scalar); and for the log
        `{"lm loss": [sum, tokens]}`, which the engine adds up over micro-batches and ranks before
        it divides, so that each token weighs the same wherever it was.
    """
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(losses.reshape(-1).float() * mask)
    tokens = mask.sum().detach()
    # The schedules divide the loss in place, so the log takes a copy.
    report = torch.stack((total.detach().clone(), tokens))
    return total, tokens.to(torch.int), {"lm loss": report}
