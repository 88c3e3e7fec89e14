import fcntl
import json
from pathlib import Path

import pytest

from megatron_mlr1.data.index import Counts
from megatron_mlr1.data.journal import (
    Journal,
    Stop,
    StoppedError,
    digest_of,
    journal_path,
    only_run,
    read_journal,
    refuse_other_plan,
    write_journal,
)
from megatron_mlr1.errors import ConfigError, DataError

PLAN = {"inputs": [{"path": "a", "bytes": 1}], "on_error": "stop", "shuffle": None}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/c"
    assert read_journal(prefix) is None
    journal = Journal(
        plan=PLAN,
        phase="shuffle",
        position={"unit": 1, "offset": 7},
        counts={"text": Counts(10, 3, 2)},
        records=3,
        rejected=1,
        rejected_bytes=20,
    )
    write_journal(prefix, journal)
    assert read_journal(prefix) == journal


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "counts": {}}',
        '{"format": 1, "counts": 3, "plan": {}}',
        '{"format": 1, "counts": {}, "plan": null}',
        "[" * 100_000,
    ],
)
def test_a_journal_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    journal_path(f"{tmp_path}/c").write_text(text)
    with pytest.raises(DataError, match=r"c\.journal\.json is no journal.*--overwrite"):
        read_journal(f"{tmp_path}/c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shuffle": 3}, "shuffle is 3 where it had None"),
        ({"inputs": [{"path": "b"}]}, r"input b is not what it was \(a\)"),
        ({"inputs": []}, "0 pieces of input where it had 1"),
    ],
)
def test_another_plan_is_refused_and_told_apart(change: dict[str, object], message: str) -> None:
    refuse_other_plan("c", Journal(plan=PLAN), PLAN)
    assert digest_of(PLAN) != digest_of(PLAN | change)
    with pytest.raises(ConfigError, match=message):
        refuse_other_plan("c", Journal(plan=PLAN), PLAN | change)


def test_a_run_that_stopped_at_a_bad_record_may_skip_it_but_not_the_other_way() -> None:
    skip = PLAN | {"on_error": "skip"}
    refuse_other_plan("c", Journal(plan=PLAN), skip)
    with pytest.raises(ConfigError, match="on_error is 'stop' where it had 'skip'"):
        refuse_other_plan("c", Journal(plan=skip), PLAN)


def test_two_runs_never_write_the_same_corpora_at_once(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/c"
    with only_run(prefix):
        with only_run(f"{tmp_path}/other"):
            pass
        with pytest.raises(ConfigError, match="another run"), only_run(prefix):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["c.journal.lock"]
    with only_run(prefix):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_comes_as_another_one_ends_keeps_a_third_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, lock = f"{tmp_path}/c", fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        Path(f"{prefix}.journal.lock").unlink()  # by the run before, since this one opened it
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with (
        only_run(prefix),
        pytest.raises(ConfigError, match="another run"),
        only_run(prefix),
    ):
        pass


def test_a_signal_is_obeyed_where_the_run_looks_for_it() -> None:
    stop = Stop()
    stop.obey()
    stop.ask(15, None)
    with pytest.raises(StoppedError) as caught:
        stop.obey()
    assert caught.value.number == 15


def test_a_journal_is_json_for_people_too(tmp_path: Path) -> None:
    write_journal(f"{tmp_path}/c", Journal(plan=PLAN))
    assert json.loads((tmp_path / "c.journal.json").read_text())["phase"] == "encode"
