"""The loss of a micro-batch weighs every token that counts the same."""

import torch

from megatron_mlr1.losses.language_model import linear_language_model_loss, masked_sum
from megatron_mlr1.losses.vocab_parallel import TensorParallel


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


def fused(hidden, weight, labels, mask):
    parallel = TensorParallel(group=None, num_ids=weight.size(0))
    return linear_language_model_loss(hidden, weight, labels, mask, parallel=parallel)


def test_head_and_loss_in_one_are_head_and_masked_sum():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 2, 8), torch.randn(30, 8)
    labels, mask = torch.randint(0, 30, (6, 2)), torch.randint(0, 2, (6, 2))
    pairs = []
    for way in (fused, None):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if way is None:
            z = (h @ w.T).flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(z, labels.flatten(), reduction="none")
            total, tokens, report = masked_sum(losses, mask)
        else:
            done = way(h, w, labels, mask)
            total, tokens, report = done.total, done.tokens, done.report
        # As the schedules do, in place.
        total /= tokens
        total.backward()
        pairs.append((total.detach(), tokens, report["lm loss"], h.grad, w.grad))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_in_which_nothing_counts_has_zero_gradients():
    hidden = torch.randn(4, 8, requires_grad=True)
    done = fused(hidden, torch.randn(30, 8), torch.full((4,), -100), torch.zeros(4))
    done.total.backward()
    assert (done.total.item(), done.tokens.item()) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_factor_that_half_precision_cannot_hold_is_taken_as_it_is():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    labels, mask = torch.randint(0, 30, (64,)), torch.ones(64)
    grads = []
    for factor in (1.0, 1 / 3):
        h = hidden.clone().requires_grad_()
        (fused(h, weight, labels, mask).total * factor).backward()
        assert h.grad is not None
        grads.append(h.grad.double().abs().sum())
    # 1 / 3 is off by 2^-9 in bf16, which would make every element so much too large. Each is
    # rounded by up to 2^-9 as it is, this way and that.
    assert abs(float(3 * grads[1] / grads[0]) - 1) < 2**-11
