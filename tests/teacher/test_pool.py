import json
import threading
import time
from contextlib import suppress

import pytest

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher import roll
from megatron_mlr1.teacher.pool import (
    LEASE_S,
    AddressPool,
    FolderPool,
    Lease,
    LeaseKeeper,
    join,
    make_pool,
    needs_ipv6,
    open_pool,
)

LEASE = Lease(name="a", endpoint="tcp://10.0.0.1:5555", fingerprint="f" * 32, public_key="k" * 40)


@pytest.fixture
def later(monkeypatch):
    """Give what moves the clocks on by so many seconds."""
    wall, ticks, ahead = time.time, time.monotonic, [0.0]
    monkeypatch.setattr(time, "time", lambda: wall() + ahead[0])
    monkeypatch.setattr(time, "monotonic", lambda: ticks() + ahead[0])

    def move(seconds):
        ahead[0] += seconds

    return move


def write(folder, name, **changes):
    fields = {
        "name": name,
        "endpoint": "tcp://10.0.0.1:5555",
        "fingerprint": "",
        "public_key": "",
        "expires": time.time() + 60,
    }
    (folder / f"{name}.lease").write_text(json.dumps(fields | changes))


def test_a_kept_lease_is_found_and_a_given_up_one_is_not(tmp_path):
    keeper = LeaseKeeper(tmp_path / "pool", LEASE)
    pool = open_pool(str(tmp_path / "pool"))
    assert pool.leases() == []
    keeper.keep()
    (found,) = pool.leases()
    assert (found.name, found.endpoint) == (LEASE.name, LEASE.endpoint)
    assert (found.fingerprint, found.public_key) == (LEASE.fingerprint, LEASE.public_key)
    assert 0 < found.expires - time.time() <= LEASE_S
    keeper.give_up()
    assert pool.leases() == []
    assert not list((tmp_path / "pool").iterdir())


def test_a_pool_has_one_teacher(tmp_path):
    write(tmp_path, "same", fingerprint="a" * 32)
    write(tmp_path, "dead", fingerprint="b" * 32, expires=time.time() - 1)
    join(tmp_path, "one more", "a" * 32)
    with pytest.raises(TeacherError, match="the replica same of the teacher aaaa"):
        join(tmp_path, "other", "b" * 32)


def come_together(folder, fingerprints):
    """Join with all of them at one moment; give the fingerprints of those that were let in."""
    start, let_in = threading.Barrier(len(fingerprints)), []

    def come(name, fingerprint):
        start.wait()
        with suppress(TeacherError):
            join(folder, name, fingerprint)
            let_in.append(fingerprint)

    comers = [
        threading.Thread(target=come, args=(f"r{number}", fingerprint))
        for number, fingerprint in enumerate(fingerprints)
    ]
    for comer in comers:
        comer.start()
    for comer in comers:
        comer.join()
    return let_in


@pytest.mark.parametrize("before", ["nobody", "another teacher", "one of them"])
def test_of_different_teachers_that_come_together_one_is_let_in(tmp_path, before):
    first, second = "a" * 32, "b" * 32
    for attempt in range(15):
        folder = tmp_path / f"pool{attempt}"
        if before != "nobody":
            long_ago = roll.Entry(
                number=7,
                name="old",
                fingerprint="c" * 32 if before == "another teacher" else first,
                expires=time.time() - 60,
            )
            folder.mkdir()
            assert roll.append(folder, long_ago)
        let_in = come_together(folder, [first, second] * 4)
        assert let_in in ([first] * 4, [second] * 4)
        numbers = range(1, 5) if before == "nobody" else range(7, 12)
        assert entries(folder) == list(numbers)


def entries(folder):
    """Numbers of all entries of a pool's roll that holds nothing else."""
    return sorted(int(path.name.removesuffix(".joined")) for path in folder.iterdir())


def test_who_joined_is_there_before_its_lease_is(tmp_path):
    join(tmp_path, "first", "a" * 32)
    with pytest.raises(TeacherError, match="the replica first of the teacher aaaa"):
        join(tmp_path, "second", "b" * 32)
    join(tmp_path, "third", "a" * 32)


def test_a_pool_is_free_when_the_last_of_its_teacher_is_gone(tmp_path, monkeypatch):
    join(tmp_path, "died before its lease", "a" * 32)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + LEASE_S + 1)
    join(tmp_path, "second", "b" * 32)
    with pytest.raises(TeacherError, match="the replica second"):
        join(tmp_path, "back", "a" * 32)


def test_a_replica_that_was_silent_while_another_teacher_came_leaves(tmp_path, later):
    keeper = LeaseKeeper(tmp_path, LEASE)
    join(tmp_path, LEASE.name, LEASE.fingerprint)
    keeper.keep()
    later(LEASE_S + 1)
    join(tmp_path, "other", "b" * 32)
    with pytest.raises(TeacherError, match="other brought the teacher bbbb"):
        keeper.keep()
    assert FolderPool(tmp_path).leases() == []


def test_a_lease_is_renewed_before_it_runs_out(tmp_path, later):
    keeper = LeaseKeeper(tmp_path, LEASE)
    keeper.keep()
    (first,) = FolderPool(tmp_path).leases()
    keeper.keep()
    assert FolderPool(tmp_path).leases() == [first]
    later(LEASE_S / 2)
    keeper.keep()
    (second,) = FolderPool(tmp_path).leases()
    assert second.expires > first.expires


def test_a_lease_that_has_run_out_is_remarks_and_swept(tmp_path):
    write(tmp_path, "just", expires=time.time() - 1)
    write(tmp_path, "long", expires=time.time() - 1000)
    write(tmp_path, "good")
    assert [lease.name for lease in FolderPool(tmp_path).leases()] == ["good"]
    LeaseKeeper(tmp_path, LEASE).keep()
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "good", "just"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 4000,
        "{}",
        '{"name": 1}',
        "x" * 10_000,
    ],
)
def test_a_file_that_is_no_lease_is_remarks(tmp_path, text):
    (tmp_path / "bad.lease").write_text(text)
    write(tmp_path, "good")
    assert [lease.name for lease in FolderPool(tmp_path).leases()] == ["good"]


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoint": "http://10.0.0.1:1"},
        {"endpoint": 5},
        {"expires": "soon"},
        {"expires": True},
        {"more": 1},
    ],
    ids=str,
)
def test_a_lease_with_wrong_fields_is_remarks(tmp_path, changes):
    write(tmp_path, "bad", **changes)
    assert FolderPool(tmp_path).leases() == []


def test_a_pool_says_why_it_has_few_members(tmp_path):
    pool = FolderPool(tmp_path)
    assert pool.remarks() == f"{tmp_path} holds no lease: no replica has come, or all left."
    write(tmp_path, "good")
    assert pool.remarks() == ""
    write(tmp_path, "old", expires=time.time() - 300)
    write(tmp_path, "older", expires=time.time() - 900)
    (tmp_path / "bad.lease").write_text("{")
    (tmp_path / "notes.txt").write_text("")
    told = pool.remarks()
    assert f"Leases in {tmp_path} that have run out: 2, the newest 30" in told
    assert "clocks differ" in told
    assert f"Files in {tmp_path} that are no lease of this version: 1." in told
    assert AddressPool(("tcp://h:1",)).remarks() == ""


def test_a_lease_that_cannot_be_renewed_is_tried_again(tmp_path, caplog, later):
    folder = tmp_path / "pool"
    keeper = LeaseKeeper(folder, LEASE)
    folder.rename(tmp_path / "away")
    with pytest.raises(MachineError, match="can write"):
        keeper.keep()
    (tmp_path / "away").rename(folder)
    later(LEASE_S / 2)
    keeper.keep()
    folder.rename(tmp_path / "away")
    later(LEASE_S / 2)
    keeper.keep()
    later(LEASE_S / 2)
    keeper.keep()
    assert caplog.text.count("not renewed") == 1, "it is told once"
    (tmp_path / "away").rename(folder)
    later(LEASE_S / 2)
    keeper.keep()
    assert caplog.text.count("renewed again") == 1
    assert [path.name for path in folder.iterdir()] == ["a.lease"]
    assert len(FolderPool(folder).leases()) == 1


def test_a_pool_is_made_and_left_empty_or_refused(tmp_path):
    make_pool(tmp_path / "new" / "pool")
    assert list((tmp_path / "new" / "pool").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "pool"):
        for enter in (make_pool, lambda folder: join(folder, "a", "f" * 32)):
            with pytest.raises(MachineError, match="can write"):
                enter(folder)


@pytest.mark.parametrize(
    ("endpoint", "needs"),
    [
        ("tcp://127.0.0.1:1", False),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", False),
        ("ipc:///tmp/x", False),
        ("tcp://a-name-that-nobody-has.invalid:1", False),
    ],
)
def test_a_name_is_reached_by_ipv4_where_it_can_be(endpoint, needs):
    assert needs_ipv6(endpoint) is needs


def test_a_list_of_addresses_is_a_pool():
    pool = open_pool("tcp://host-a:5555,host-b:5556,tcp://[::1]:7")
    assert isinstance(pool, AddressPool)
    assert [lease.endpoint for lease in pool.leases()] == [
        "tcp://host-a:5555",
        "tcp://host-b:5556",
        "tcp://[::1]:7",
    ]
    assert open_pool("ipc:///tmp/teacher").leases()[0].endpoint == "ipc:///tmp/teacher"


@pytest.mark.parametrize(
    "where", ["tcp://", "tcp://host", "tcp://h:0", "tcp://h:99999", "udp://h:1"]
)
def test_an_address_that_is_none_is_refused(where):
    with pytest.raises(TeacherError):
        open_pool(where)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for where in (str(tmp_path / "missing"), ""):
        with pytest.raises(TeacherError, match="no folder"):
            open_pool(where)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError):
        LeaseKeeper(tmp_path / "file", LEASE)
