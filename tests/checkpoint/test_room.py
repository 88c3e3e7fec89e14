"""Room for a checkpoint."""

import pytest

from megatron_mlr1.checkpoint.room import refuse_little_room, remove
from megatron_mlr1.errors import MachineError


def test_a_disk_without_room_for_one_checkpoint_is_refused_with_both_figures(tmp_path):
    with pytest.raises(MachineError, match=r"has room for [\d.e+]+ .B, .* takes 1e\+09 GB or more"):
        refuse_little_room(tmp_path, 10**18)
    refuse_little_room(tmp_path, 1)


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_the_one_above(tmp_path):
    refuse_little_room(tmp_path / "run" / "save", 1)
    with pytest.raises(MachineError, match="run/save has room for"):
        refuse_little_room(tmp_path / "run" / "save", 10**18)
    assert not (tmp_path / "run").exists()


def test_a_link_to_a_checkpoint_is_removed_and_the_checkpoint_stays(tmp_path):
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    (there / "file").write_bytes(b"12345")
    link.symlink_to(there)
    assert remove(link)
    assert not link.is_symlink()
    assert (there / "file").read_bytes() == b"12345"
    assert remove(there)
    assert remove(there), "nothing is there to be removed"
    assert not there.exists()
