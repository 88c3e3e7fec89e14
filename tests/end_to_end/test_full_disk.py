"""A disk that does not take a checkpoint ends a run in words, and what was saved before stays.

A limit on the size of files (EFBIG) stands for a full disk (ENOSPC) or a quota (EDQUOT): the
system's answer comes at the same places, and nobody needs to be root.
"""

import resource

from tests.end_to_end.conftest import FIRST, LAST, exact

TRACKER = "latest_checkpointed_iteration.txt"
LIMIT = 1_000_000
"""Bytes: above the log, the record and TensorBoard's file, below a checkpoint's tensors."""


def limit_files_of_last_rank(run):
    """Let the last rank of the run write small files alone."""
    resource.prlimit(run.pids[-1], resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


AT_A_FULL_DISK = FIRST + 1, limit_files_of_last_rank


def test_the_last_whole_checkpoint_stays_and_the_run_goes_on_from_it_bitwise(
    train, single, from_step_five
):
    save = from_step_five("save")
    left_over = save / f"iter_{LAST:07d}"
    left_over.mkdir()
    (left_over / "__7_0.distcp").write_bytes(b"of a run that was killed while it saved")
    words = ("--save-interval", "30")

    ended = train(save, *words, at_step=AT_A_FULL_DISK)
    assert ended.output.count("\nerror: ") == 1, ended.output[-3000:]
    assert f"iter_{LAST:07d} could not be written: [Errno 27] File too large" in ended.output
    assert "is removed; the last whole checkpoint is iter_0000005" in ended.output
    assert "[rank 0] exitcode : 2" in ended.output
    assert "Traceback" not in ended.output
    assert (save / TRACKER).read_text() == "5"
    assert not left_over.exists()

    done = train(save, *words)
    assert done.code == 0, done.output[-3000:]
    assert exact(save) == {step: exact(single)[step] for step in range(FIRST + 1, LAST + 1)}
    assert (save / TRACKER).read_text() == str(LAST)

    saved = {path: path.stat().st_mtime_ns for path in left_over.iterdir()}
    again = train(save, *words)
    assert again.code == 0, again.output[-3000:]
    assert f"iteration {LAST} is saved already" in again.output
    assert {path: path.stat().st_mtime_ns for path in left_over.iterdir()} == saved


def test_all_processes_end_alike_where_one_of_them_cannot_write(train, from_step_five):
    save = from_step_five("save")
    ended = train(save, "--save-interval", "20", processes=2, at_step=AT_A_FULL_DISK)
    assert ended.output.count("\nerror: ") == 1, ended.output[-3000:]
    assert "File too large (rank 1). What was written of it is removed" in ended.output
    assert "[rank 0] exitcode : 2\n[rank 1] exitcode : 2" in ended.output
    assert "Traceback" not in ended.output
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000005"]
    assert (save / TRACKER).read_text() == "5"
