"""What shards of a vocabulary know together is what one knows alone."""

from itertools import pairwise

import pytest
import torch

from megatron_mlr1.ops.kl_known import COLUMNS, known_of, sums_at
from megatron_mlr1.ops.kl_rows import kl_partials_reference

CUTS = [0, 7, 7, 40, 61]
"""Of 61 ids; the second shard has none."""


def known_to_shards(z, t, label, temperature, direction):
    """What follows from the sums of shards; the label belongs to one of them."""
    partials = []
    for begin, end in pairwise(CUTS):
        here = torch.where((label >= begin) & (label < end), label - begin, -1)
        logits = z[:, begin:end], t[:, begin:end]
        partials.append(kl_partials_reference(*logits, here, temperature, direction == "reverse"))
    tops = torch.stack([each[:2] for each in partials]).amax(0)
    sums = torch.stack([sums_at(each, tops, temperature) for each in partials]).sum(0)
    return known_of(tops, sums, temperature, direction)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_sums_of_shards_say_what_the_formulas_say(direction, temperature):
    generator = torch.Generator().manual_seed(0)
    z, t = 3 * torch.randn(2, 5, 61, generator=generator, dtype=torch.float64)
    z[0, t[0].argmax()] = 40
    label = torch.tensor([0, 6, 7, 40, 60])
    known = known_to_shards(z, t, label, temperature, direction)
    split = torch.rand(3, 5, dtype=torch.float64)
    got = dict(zip(COLUMNS, known.columns(split), strict=True))
    log_q, log_p = (z / temperature).log_softmax(1), (t / temperature).log_softmax(1)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    warm = t.log_softmax(1)
    wanted = {
        "lse": z.logsumexp(1),
        "cross_entropy": torch.nn.functional.cross_entropy(z, label, reduction="none"),
        "divergence": (first.exp() * (first - second)).sum(1),
        "teacher_entropy": -(warm.exp() * warm).sum(1),
        "teacher_cross_entropy": torch.nn.functional.cross_entropy(t, label, reduction="none"),
        "agreement": (z.argmax(1) == t.argmax(1)).double(),
    }
    assert got["agreement"][0] == 1
    for name, want in wanted.items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


def test_a_token_without_weight_pulls_nothing_whatever_its_logits_are():
    z, t = torch.randn(2, 2, 61, dtype=torch.float64)
    z[0, 3] = torch.nan
    known = known_to_shards(z, t, torch.tensor([1, 2]), 1.0, "forward")
    assert known.lse.isnan().tolist() == [True, False]
    weights = torch.tensor([[0.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
    pull, weight, kd = known.weights_3C(weights, 2.0, 0.0)
    assert pull.tolist() == [0, 0.5]
    assert weight.tolist() == [0, 0.5]
    assert kd.tolist() == [0, 0.5]
