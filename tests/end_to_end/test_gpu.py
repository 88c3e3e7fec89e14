"""What CPU mode computes, a GPU computes: from the same checkpoint, with and without
Transformer Engine, and in FP8."""

import pytest

from tests.end_to_end.conftest import FIRST, LAST, exact, record

pytestmark = pytest.mark.gpu

TORCH = ("--transformer-impl", "local", "--no-rope-fusion", "--no-masked-softmax-fusion")


def largest_difference(save, reference):
    ours, theirs = exact(save), exact(reference)
    assert set(ours) == set(range(FIRST + 1, LAST + 1))
    return max(abs(row[0] - theirs[step][0]) / theirs[step][0] for step, row in ours.items())


def test_torch_modules_give_the_cpus_losses(train, single, from_step_five):
    save = from_step_five("torch")
    done = train(save, *TORCH, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert "CPU mode" not in done.output
    assert largest_difference(save, single) < 1e-3


def test_masked_documents_train(train, from_step_five):
    save = from_step_five("masked")
    done = train(save, *TORCH, "--dataloader-inter-document-masking", gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert record(save)[LAST]["lm loss"] < record(save)[FIRST + 1]["lm loss"]


@pytest.mark.te
def test_transformer_engine_reads_what_torch_modules_wrote(train, single, from_step_five):
    save = from_step_five("te")
    done = train(save, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert largest_difference(save, single) < 1e-3


@pytest.mark.te
def test_torch_modules_read_what_transformer_engine_wrote(train, single, from_step_five):
    save = from_step_five("both")
    words = ("--save-interval", "15", "--exit-interval", "15")
    assert train(save, *words, gpu=True).code == 0
    done = train(save, *TORCH, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert largest_difference(save, single) < 1e-3


@pytest.mark.te
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_trains_like_fp32(recipe, train, single, from_step_five):
    save = from_step_five(recipe)
    words = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe, "--no-load-optim")
    done = train(save, *words, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert record(save)[LAST]["lm loss"] == pytest.approx(record(single)[LAST]["lm loss"], rel=0.03)
