"""The file that names the newest checkpoint."""

import pytest

from megatron_mlr1 import cpu

cpu.activate()

from megatron.training import checkpointing  # noqa: E402

from megatron_mlr1.engine.start import TRACKER  # noqa: E402
from megatron_mlr1.engine.tracker import WholeTracker  # noqa: E402


@pytest.fixture
def files() -> WholeTracker:
    return WholeTracker(checkpointing.maybe_msc)


def test_the_tracker_has_its_old_text_until_the_new_one_is_whole(tmp_path, files):
    path = tmp_path / TRACKER
    path.write_text("5")
    with files.open(str(path), "w") as stream:
        stream.write("10")
        assert path.read_text() == "5"
    assert path.read_text() == "10"
    assert [entry.name for entry in tmp_path.iterdir()] == [TRACKER]


def test_a_tracker_that_cannot_be_written_names_what_it_named(tmp_path, files):
    path = tmp_path / TRACKER
    path.write_text("5")
    (tmp_path / f"{TRACKER}.partial").mkdir()
    with pytest.raises(OSError, match="partial"), files.open(str(path), "w") as stream:
        stream.write("10")
    with files.open(str(path), "r") as stream:
        assert stream.read() == "5"


def test_all_other_files_are_the_engines(tmp_path, files):
    with files.open(str(tmp_path / "other"), "w") as stream:
        stream.write("1")
    assert (tmp_path / "other").read_text() == "1"
    assert files.os.path.isdir(tmp_path)
