import json
import threading

import pytest

from megatron_mlr1.teacher.roll import Entry, append, newest


def entry(number, name="a"):
    return Entry(number=number, name=name, fingerprint="f" * 32, expires=5.0)


def test_the_newest_entry_is_read_and_older_ones_are_removed(tmp_path):
    assert newest(tmp_path) is None
    (tmp_path / "notes.txt").write_text("")
    for number in (1, 2, 10):
        assert append(tmp_path, entry(number))
        assert newest(tmp_path) == entry(number)
    assert {path.name for path in tmp_path.iterdir()} == {"00000010.joined", "notes.txt"}


def test_of_many_that_try_for_one_number_one_succeeds(tmp_path):
    for number in range(1, 30):
        start, won = threading.Barrier(8), []

        def compete(name, number=number, start=start, won=won):
            start.wait()
            if append(tmp_path, entry(number, name)):
                won.append(name)

        threads = [threading.Thread(target=compete, args=(str(i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [newest(tmp_path).name] == won
    assert len(list(tmp_path.iterdir())) == 1, "who lost left nothing behind"


def test_a_number_behind_which_others_joined_is_not_to_be_had(tmp_path):
    assert append(tmp_path, entry(1))
    assert append(tmp_path, entry(2))
    assert not append(tmp_path, entry(1, "late"))
    assert newest(tmp_path) == entry(2)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 4000, '{"number": 4}', json.dumps({"number": 4, "of": "later"})],
)
def test_a_file_that_is_no_entry_keeps_its_number_and_names_nobody(tmp_path, text):
    (tmp_path / "00000004.joined").write_text(text)
    assert newest(tmp_path) == Entry(number=4, name="", fingerprint="", expires=0.0)
    assert append(tmp_path, entry(5))
