"""A vocabulary that is split over processes gives the losses and gradients of a whole one."""

from itertools import product

import pytest

from tests.support.world import run_in_world

WIDTHS = (1, 2, 4)
LOSSES = ("cross_entropy", "forward", "reverse", "jsd", "bucket", "hybrid")
LAYOUTS = [
    (1, False, 61),
    (2, False, 61),
    (2, True, 61),
    (4, False, 61),
    (4, True, 61),
    (4, True, 45),
]
"""(processes, whether sequences are split, ids that exist of 64 rows): in four shards of 16 the
last has 13 of 61 ids and none of 45."""
FACTOR = 3.0
"""The gradient that reaches the loss from above."""


@pytest.fixture(scope="module")
def worst(tmp_path_factory):
    """Largest error of any process, by loss and layout."""
    answers = run_in_world(4, measure, tmp_path_factory.mktemp("world"))
    return {key: max(answer[key] for answer in answers) for key in answers[0]}


def measure():
    import torch.distributed as dist

    from megatron_mlr1.losses.vocab_parallel import TensorParallel

    rank = dist.get_rank()
    groups = {
        width: [dist.new_group(list(range(first, first + width))) for first in range(0, 4, width)]
        for width in WIDTHS
    }
    errors = {}
    for loss, (width, sequence, ids) in product(LOSSES, LAYOUTS):
        whole = results(loss, ids, TensorParallel(group=None, num_ids=ids))
        parallel = TensorParallel(
            group=groups[width][rank // width], num_ids=ids, sequence=sequence
        )
        got = results(loss, ids, parallel)
        errors[loss, width, sequence, ids] = difference(got, whole)
    return errors


def results(loss, ids, parallel):
    """Total, gradients and log of one loss on this process's part of inputs made whole."""
    import torch

    from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, distillation_loss
    from megatron_mlr1.losses.language_model import linear_language_model_loss
    from megatron_mlr1.ops.linear_kl import Head, Objective
    from megatron_mlr1.ops.sparse_targets import SparseForm, offsets, sparse_targets
    from tests.support.softmax_losses import case, logits

    inputs = case(tokens=24, ids=ids, padding=64 - ids)
    # The first and the last id of each shard are labels.
    ends = [id for first in range(0, 64, 16) for id in (first, first + 15) if id < ids]
    inputs.labels[: len(ends)] = torch.tensor(ends)
    rank, size = (0, 1) if parallel.group is None else (parallel.group.rank(), parallel.size)
    part = slice(24 * rank // size, 24 * (rank + 1) // size) if parallel.sequence else slice(None)
    rows = slice(64 * rank // size, 64 * (rank + 1) // size)
    # Sequence first, as the engine has it: 12 places of 2 sequences.
    hidden = inputs.hidden[part].reshape(-1, 2, inputs.hidden.size(1)).clone().requires_grad_()
    weight = inputs.weight[rows].clone().requires_grad_()
    labels, mask = inputs.labels.view(-1, 2), (inputs.ce_weight > 0.3).view(-1, 2)
    if loss == "cross_entropy":
        done = linear_language_model_loss(
            hidden, weight, labels, mask, parallel=parallel, z_loss=0.01
        )
    else:
        temperature, targets = 2.0, HiddenTargets(hidden=inputs.teacher_hidden[part])
        if loss in ("bucket", "hybrid"):
            form = SparseForm(top=6, points=5 * (loss == "hybrid"), temperature=temperature)
            t = logits(inputs.teacher_hidden, inputs.teacher_weight, ids)
            # The ends of the shards are among the likeliest ids.
            t[:, ends] += 3
            targets = sparse_targets(t, offsets(bytes(16), 0, 0, 24), form)
        direction = loss if loss in ("reverse", "jsd") else "forward"
        lesson = Lesson(
            targets=targets,
            alpha=0.3,
            mask=(inputs.kd_weight > 0.3).view(-1, 2),
            objective=Objective(direction=direction, temperature=temperature, z_loss=0.01),
        )
        done = distillation_loss(
            Head(hidden=hidden, weight=weight),
            lesson,
            labels,
            mask,
            teacher_weight=inputs.teacher_weight[rows],
            parallel=parallel,
        )
    (FACTOR * done.total).backward()
    place = slice(24 * rank // size // 2, 24 * (rank + 1) // size // 2)
    return {
        "total": done.total.detach(),
        "hidden": hidden.grad if parallel.sequence else hidden.grad[place],
        "weight": weight.grad,
        "report": torch.stack(list(done.report.values())).double(),
        "places": (place, rows),
    }


def difference(got, whole):
    """Largest difference, relative to the largest number of its kind."""
    place, rows = got["places"]
    parts = {"total": ..., "hidden": place, "weight": rows, "report": ...}
    errors = {
        name: float((got[name] - whole[name][part]).abs().max() / whole[name].abs().max())
        for name, part in parts.items()
    }
    # The log is fp32.
    errors["report"] *= 1e-6
    return max(errors.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(worst, loss, layout):
    assert worst[loss, *layout] < 1e-12
