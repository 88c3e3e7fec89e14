import json
import threading

import pytest

from megatron_mlr1.teacher import roll
from megatron_mlr1.teacher.roll import Entry, append, newest


def entry(number, name="a"):
    return Entry(number=number, name=name, fingerprint="f" * 32, expires=5.0)


def test_the_newest_entry_is_read(tmp_path):
    assert newest(tmp_path) is None
    (tmp_path / "notes.txt").write_text("")
    for number in (1, 2, 10):
        assert append(tmp_path, entry(number))
        assert newest(tmp_path) == entry(number)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_entries_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(roll, "KEPT", 5)
    (tmp_path / "notes.txt").write_text("")
    for number in range(1, 9):
        assert append(tmp_path, entry(number))
    kept = [f"{number:08}.joined" for number in range(4, 9)]
    assert names(tmp_path) == [*kept, "notes.txt"]


@pytest.mark.parametrize("joined_since", [1, 2, 5, 10])
def test_a_number_is_given_out_once(tmp_path, monkeypatch, joined_since):
    monkeypatch.setattr(roll, "KEPT", 5)
    for number in range(3, 3 + joined_since):
        assert append(tmp_path, entry(number))
    before = names(tmp_path)
    assert not append(tmp_path, entry(3, "late"))
    assert names(tmp_path) == before


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
    assert len(list(tmp_path.iterdir())) == 29, "who lost left nothing behind"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "[" * 4000, '{"number": 4}', json.dumps({"number": 4, "of": "later"})],
)
def test_a_file_that_is_no_entry_keeps_its_number_and_names_nobody(tmp_path, text):
    (tmp_path / "00000004.joined").write_text(text)
    assert newest(tmp_path) == Entry(number=4, name="", fingerprint="", expires=0.0)
    assert append(tmp_path, entry(5))
