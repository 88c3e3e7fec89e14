"""A run that is stopped and started again is bitwise the run that never was."""

import re
import signal

from tests.end_to_end.conftest import LAST, checkpoint_of, exact, record

REAL = ("--bf16", "--overlap-grad-reduce", "--overlap-param-gather", "--save-interval", "10")
"""As on a cluster: bf16 weights, distributed optimizer, communication overlapped."""
EVALUATED = ("--eval-iters", "1", "--eval-interval", "4", "--split", "80,20,0")


def validation(output):
    """The validation losses of a run's log, by step."""
    found = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", output)
    return {int(step): loss for step, loss in found}


def test_after_sigterm_and_after_kill_the_losses_are_the_same_to_the_last_bit(train, tmp_path):
    whole = tmp_path / "whole"
    words = (*REAL, *EVALUATED)
    uninterrupted = train(whole, *words, processes=2)
    assert uninterrupted.code == 0, uninterrupted.output[-3000:]

    save = tmp_path / "stopped"
    done = train(save, *words, processes=2, signal_at=(6, signal.SIGTERM))
    losses = validation(done.output)
    saved_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved_at >= 6, done.output[-3000:]
    assert saved_at % 10 != 0, "this was an ordinary checkpoint, not one made for the signal"

    done = train(save, *words, processes=2, signal_at=(13, signal.SIGKILL))
    losses |= validation(done.output)
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) == 10

    done = train(save, *words, processes=2)
    losses |= validation(done.output)
    assert done.code == 0, done.output[-3000:]
    assert "goes on from its last checkpoint" in done.output
    assert exact(save) == exact(whole)
    assert losses == validation(uninterrupted.output)
    assert list(losses) == [*range(4, LAST, 4)]
    assert record(save)[LAST]["corpus_tokens"] == record(whole)[LAST]["corpus_tokens"]


def test_a_global_batch_that_grows_goes_on_where_it_was(train, tmp_path):
    words = ("--step-batch-size-schedule", "0:8 2560:16", "--save-interval", "4")
    length = ("--train-samples", "96", "--lr-warmup-samples", "16")
    whole = tmp_path / "whole"
    done = train(whole, *words, length=length)
    assert done.code == 0, done.output[-3000:]
    consumed = [row["consumed_samples"] for row in record(whole).values()]
    assert consumed == [8, 16, 24, 32, 40, 56, 72, 88, 104]

    save = checkpoint_of(whole, 4, tmp_path / "stopped")
    done = train(save, *words, length=length)
    assert done.code == 0, done.output[-3000:]
    assert exact(save) == {step: row for step, row in exact(whole).items() if step > 4}
