import base64
import json
from pathlib import Path

from megatron_mlr1.data.encode import Rejected
from megatron_mlr1.data.quarantine import Quarantine, publish_rejected

GOOD = Rejected("a.jsonl:3", "not JSON", "{'ü'}".encode())
ODD = Rejected("a.jsonl:4", "not UTF-8", b"\xff\n")


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_record_has_its_place_its_reason_and_what_it_was(tmp_path: Path) -> None:
    quarantine = Quarantine(f"{tmp_path}/c", 0)
    quarantine.write([GOOD, ODD])
    quarantine.close()
    publish_rejected(f"{tmp_path}/c")
    publish_rejected(f"{tmp_path}/c")
    found = lines(tmp_path / "c.rejected.jsonl")
    assert found[0] == {"where": "a.jsonl:3", "reason": "not JSON", "raw": "{'ü'}"}
    assert base64.b64decode(found[1]["raw_base64"]) == b"\xff\n"
    assert [path.name for path in tmp_path.iterdir()] == ["c.rejected.jsonl"]


def test_what_was_written_after_the_point_that_counts_goes(tmp_path: Path) -> None:
    quarantine = Quarantine(f"{tmp_path}/c", 0)
    quarantine.write([GOOD])
    size = quarantine.num_bytes
    quarantine.write([ODD, ODD])
    quarantine.close()
    again = Quarantine(f"{tmp_path}/c", size)
    again.write([ODD])
    again.flush()
    again.close()
    publish_rejected(f"{tmp_path}/c")
    assert [line["where"][-1] for line in lines(tmp_path / "c.rejected.jsonl")] == ["3", "4"]


def test_nothing_rejected_leaves_no_file_not_even_an_old_one(tmp_path: Path) -> None:
    (tmp_path / "c.rejected.jsonl").touch()
    Quarantine(f"{tmp_path}/c", 0).close()
    publish_rejected(f"{tmp_path}/c")
    assert list(tmp_path.iterdir()) == []
