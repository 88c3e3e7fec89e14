"""Every layout of two processes trains as one process does, from the same weights."""

import pytest

from tests.end_to_end.conftest import FIRST, LAST, checkpoint_of, exact, record

LAYOUTS = {
    "tensor-and-sequence": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "pipeline": ("--pipeline-model-parallel-size", "2"),
    "context": ("--context-parallel-size", "2"),
    "data": (),
}
LIMIT = 1e-4


def assert_trained_alike(save, reference, first):
    ours, theirs = exact(save), exact(reference)
    assert set(ours) == set(range(first + 1, LAST + 1))
    losses, norms = (
        sorted(abs(row[n] - theirs[step][n]) / abs(theirs[step][n]) for step, row in ours.items())
        for n in (0, 1)
    )
    assert losses[-1] < LIMIT
    # The norm of Q and K divides by their lengths, so a token whose query is next to nothing has a
    # gradient as sharp as its rounding is rough. Once in a while one sits in a batch.
    assert norms[-2] < LIMIT
    assert norms[-1] < 10 * LIMIT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_the_single_processs(layout, train, single, from_step_five):
    save = from_step_five("save")
    done = train(save, "--save-interval", "20", *LAYOUTS[layout], processes=2)
    assert done.code == 0, done.output[-3000:]
    assert_trained_alike(save, single, FIRST)


def test_one_seed_draws_the_same_weights_for_any_micro_batch(train, single, tmp_path):
    save = tmp_path / "save"
    done = train(save, "--micro-batch-size", "2", "--exit-interval", "1")
    assert done.code == 0, done.output[-3000:]
    ours, theirs = (record(run)[1]["lm loss"] for run in (save, single))
    assert abs(ours - theirs) < 1e-5 * theirs


def test_stages_hand_on_masked_documents(train, from_step_five):
    alone, pipeline = from_step_five("alone"), from_step_five("pipeline")
    done = train(alone, "--save-interval", "20", "--document-mask")
    assert done.code == 0, done.output[-3000:]
    words = ("--save-interval", "20", "--document-mask", *LAYOUTS["pipeline"])
    done = train(pipeline, *words, processes=2)
    assert done.code == 0, done.output[-3000:]
    assert_trained_alike(pipeline, alone, FIRST)


def test_a_checkpoint_of_one_layout_goes_on_in_another(train, single, from_step_five, tmp_path):
    pipeline = from_step_five("pipeline")
    words = LAYOUTS["pipeline"]
    done = train(pipeline, "--save-interval", "10", "--exit-interval", "10", *words, processes=2)
    assert done.code == 0, done.output[-3000:]
    tensor = checkpoint_of(pipeline, 10, tmp_path / "tensor")
    words = ("--tensor-model-parallel-size", "2", "--save-interval", "20")
    done = train(tensor, *words, processes=2)
    assert done.code == 0, done.output[-3000:]
    assert_trained_alike(tensor, single, 10)


def test_the_loss_falls_and_the_record_counts_every_token(single):
    rows = record(single)
    assert rows[LAST]["lm loss"] < rows[1]["lm loss"] - 0.2
    assert rows[LAST]["tokens"] == LAST * 16 * 64
    assert sum(rows[LAST]["corpus_tokens"].values()) == rows[LAST]["tokens"]
    share = rows[LAST]["corpus_tokens"]["code"] / rows[LAST]["tokens"]
    assert share == pytest.approx(0.7, abs=0.01)
    assert rows[LAST]["tokens_per_second"] > 0
    assert rows[LAST]["tflops_per_gpu"] > 0
