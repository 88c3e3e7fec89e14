"""The share of the divergence over a run."""

from argparse import Namespace

import pytest

from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.engine.alpha import AlphaSchedule


def schedule(kind, **changes):
    whole = {"peak": 0.8, "end": 0.2, "samples": 1000, "warmup": 100, "decay": 200}
    return AlphaSchedule(kind=kind, **(whole | changes))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.8, 500: 0.8, 999: 0.8}),
        ("linear", {0: 0.8, 500: 0.5, 1000: 0.2, 1200: 0.2}),
        ("wsd", {0: 0.0, 50: 0.4, 100: 0.8, 800: 0.8, 900: 0.5, 1000: 0.2}),
    ],
)
def test_the_share_follows_the_samples(kind, expected):
    for consumed, share in expected.items():
        assert schedule(kind).at(consumed) == pytest.approx(share)


def test_a_run_without_warm_up_begins_at_the_top():
    assert schedule("wsd", warmup=0).at(0) == 0.8


ARGS = {
    "train_samples": None,
    "train_iters": 50,
    "global_batch_size": 16,
    "lr_warmup_fraction": None,
    "lr_warmup_samples": 0,
    "lr_warmup_iters": 4,
}


@pytest.mark.parametrize(
    ("changes", "samples", "warmup"),
    [
        ({}, 800, 64),
        ({"lr_warmup_fraction": 0.1}, 800, 80),
        ({"train_samples": 900, "train_iters": None, "lr_warmup_samples": 90}, 900, 90),
    ],
)
def test_length_and_warm_up_are_the_learning_rates(changes, samples, warmup):
    found = AlphaSchedule.of(Namespace(**(ARGS | changes)), DistillationOptions(teacher="t"))
    assert (found.samples, found.warmup, found.decay) == (samples, warmup, samples // 10)
