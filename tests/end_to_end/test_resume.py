"""A run that is stopped and started again is bitwise the run that never was."""

import signal

from tests.end_to_end.conftest import LAST, exact, record

REAL = ("--bf16", "--overlap-grad-reduce", "--overlap-param-gather", "--save-interval", "10")
"""As on a cluster: bf16 weights, distributed optimizer, communication overlapped."""


def test_after_sigterm_and_after_kill_the_losses_are_the_same_to_the_last_bit(train, tmp_path):
    whole = tmp_path / "whole"
    assert train(whole, *REAL, processes=2).code == 0

    save = tmp_path / "stopped"
    done = train(save, *REAL, processes=2, signal_at=(6, signal.SIGTERM))
    saved_at = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert saved_at >= 6, done.output[-3000:]
    assert saved_at % 10 != 0, "this was an ordinary checkpoint, not one made for the signal"

    train(save, *REAL, processes=2, signal_at=(13, signal.SIGKILL))
    assert int((save / "latest_checkpointed_iteration.txt").read_text()) == 10

    done = train(save, *REAL, processes=2)
    assert done.code == 0, done.output[-3000:]
    assert "goes on from its last checkpoint" in done.output
    assert exact(save) == exact(whole)
    assert record(save)[LAST]["corpus_tokens"] == record(whole)[LAST]["corpus_tokens"]
