"""The loss of a micro-batch weighs every token that counts the same."""

import torch

from megatron_mlr1.losses.language_model import masked_sum


def test_only_tokens_that_count_are_summed():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    total, tokens, report = masked_sum(losses, mask)
    total.backward()
    assert total.item() == 37.0
    assert tokens.item() == 3
    assert report["lm loss"].tolist() == [37.0, 3.0]
    assert losses.grad is not None
    assert torch.equal(losses.grad, mask.float())


def test_what_is_logged_does_not_change_with_the_loss():
    total, _, report = masked_sum(torch.ones(4), torch.ones(4))
    total.div_(4)
    assert report["lm loss"].tolist() == [4.0, 4.0]


def test_a_batch_in_which_nothing_counts_is_zero():
    total, tokens, _ = masked_sum(torch.full((3,), 5.0), torch.zeros(3))
    assert (total.item(), tokens.item()) == (0.0, 0)


def test_half_precision_losses_are_summed_in_fp32():
    total, _, _ = masked_sum(torch.full((4096,), 10.0, dtype=torch.bfloat16), torch.ones(4096))
    assert total.dtype == torch.float32
    assert total.item() == 40960.0
