import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_mlr1.errors import DataError, MachineError, TeacherError
from megatron_mlr1.teacher import store as store_module
from megatron_mlr1.teacher.audit import bits
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.spec import TargetSpec, bytes_per_token
from megatron_mlr1.teacher.store import StoredTeacher, make_store, open_store
from megatron_mlr1.teacher.store_files import ABANDONED_S, PARTIAL, Shard, sweep
from tests.support.teacher_targets import FORMS, TableTeacher, identity_of, random_request

ROOT = Path(__file__).parents[2]


def answer(teacher, request):
    return teacher.fetch(teacher.submit(request, 0), 0)


def fill(store, seeds, teacher=None):
    """Store the targets of these sequences; give their bits by key."""
    teacher = teacher or TableTeacher(store.identity)
    marks = {}
    for seed in seeds:
        request = random_request(seed, store.spec, vocab_size=store.identity.vocab_size)
        key, targets = content_key(store.identity, request), answer(teacher, request)
        store.add(key, targets)
        marks[key] = bits(targets)
    return marks


@pytest.mark.parametrize("vocab_size", [128_256, 202_048])
@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.form)
def test_what_was_stored_is_read_bit_for_bit(tmp_path, spec, vocab_size):
    store = make_store(tmp_path / "store", identity_of(vocab_size), spec)
    marks = fill(store, range(5))
    store.flush()
    again = open_store(tmp_path / "store")
    assert again.num_records == 5
    for key, mark in marks.items():
        targets = again.get(key, 24)
        targets.check(again.identity, 24)
        assert bits(targets) == mark
    assert again.get(bytes(16), 24) is None


def test_ids_below_2_to_the_17_take_17_bits(tmp_path):
    spec = TargetSpec(form="hybrid", k=32, m=16)
    store = make_store(tmp_path, identity_of(), spec)
    teacher = TableTeacher()
    request = random_request(0, spec, length=2000)
    store.add(content_key(store.identity, request), answer(teacher, request))
    store.flush()
    size = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    plain = bytes_per_token(spec, store.identity)
    assert size / 2000 == pytest.approx(plain - (32 - 17) * 48 / 8, rel=0.02)


def test_nothing_is_seen_before_it_is_finished(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    fill(store, range(3))
    assert open_store(tmp_path).num_records == 0
    store.flush()
    assert open_store(tmp_path).num_records == 3
    assert list(tmp_path.glob(f"*{PARTIAL}")) == []


def test_a_full_shard_is_finished_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 2000)
    store = make_store(tmp_path, identity_of(), TargetSpec())
    fill(store, range(9))
    assert len(list(tmp_path.glob("*.keys"))) == 3


def test_the_same_key_twice_is_harmless(tmp_path):
    one, other = (make_store(tmp_path, identity_of(), TargetSpec()) for _ in range(2))
    marks = fill(one, [1, 2, 2, 1])
    fill(other, [2, 3])
    one.flush()
    other.flush()
    again = open_store(tmp_path)
    assert again.num_records == 4
    assert all(bits(again.get(key, 24)) == mark for key, mark in marks.items())


WRITER = """
import sys
from pathlib import Path
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.store import make_store
from tests.support.teacher_targets import TableTeacher, identity_of
from tests.teacher.test_store import fill
print("ready", flush=True)
sys.stdin.readline()
store = make_store(Path(sys.argv[1]), identity_of(), TargetSpec())
fill(store, range(int(sys.argv[2]), int(sys.argv[2]) + 20))
store.keep_head(TableTeacher().head)
store.flush()
"""


def test_several_processes_write_at_once(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "s"), str(begin)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for begin in (0, 10, 20)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    store = open_store(tmp_path / "s")
    expected = fill(make_store(tmp_path / "other", identity_of(), TargetSpec()), range(40))
    assert all(bits(store.get(key, 24)) == mark for key, mark in expected.items())
    assert list((tmp_path / "s").glob(f"*{PARTIAL}")) == []


def test_a_run_in_another_layout_finds_its_targets(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    marks = fill(store, range(16))
    store.flush()
    # Two ranks, one sequence at a time, the other way round.
    for rank in range(2):
        teacher = StoredTeacher(open_store(tmp_path))
        for seed in reversed(range(rank, 16, 2)):
            request = random_request(seed)
            key = content_key(teacher.identity, request)
            assert bits(answer(teacher, request)) == marks[key]


def test_the_head_is_stored_and_read_in_parts(tmp_path):
    store = make_store(tmp_path, identity_of(10_000), TargetSpec())
    teacher = TableTeacher(store.identity)
    with pytest.raises(TeacherError, match="no head"):
        store.head(0, 5)
    store.keep_head(teacher.head)
    again = StoredTeacher(open_store(tmp_path))
    for begin, end in ((0, 10_000), (4095, 4097), (9999, 10_000), (5000, 9000)):
        assert np.array_equal(again.head(begin, end), teacher.head(begin, end))
    with pytest.raises(TeacherError, match="10000 rows"):
        again.head(0, 10_001)


def test_what_a_killed_writer_left_of_the_head_does_not_keep_it_from_being_stored(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    (tmp_path / f"head.arrow{PARTIAL}").write_text("half")

    def fails(begin, end):
        raise TeacherError("the teacher died")

    with pytest.raises(TeacherError, match="died"):
        store.keep_head(fails)
    assert not store.has_head
    assert len(list(tmp_path.glob(f"*{PARTIAL}"))) == 1, "the second one cleaned up behind itself"
    store.keep_head(TableTeacher().head)
    assert store.has_head


def test_the_store_of_another_teacher_or_form_is_refused(tmp_path):
    make_store(tmp_path, identity_of(), TargetSpec())
    with pytest.raises(TeacherError, match=r"table-0.*table-1"):
        make_store(tmp_path, identity_of(seed=1), TargetSpec())
    with pytest.raises(TeacherError, match="top_k"):
        make_store(tmp_path, identity_of(), TargetSpec(form="top_k", k=3))


def test_a_sequence_that_was_not_stored_is_an_error(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    fill(store, [1])
    store.flush()
    teacher = StoredTeacher(store)
    with pytest.raises(TeacherError, match="tiered:"):
        teacher.submit(random_request(2), 0)
    with pytest.raises(TeacherError, match="has one form"):
        teacher.submit(random_request(1, TargetSpec(form="top_k", k=2)), 0)


@pytest.mark.parametrize("manifest", [None, "{", '{"version": 2}', '{"version": 1}'], ids=str)
def test_a_folder_that_is_no_store_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "store.json").write_text(manifest)
    with pytest.raises(DataError, match="store of targets"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float8"}, {"vocab_size": "256"}, {"fingerprint": "x"}, {"more": 1}]
)
def test_a_store_whose_teacher_is_none_is_refused(tmp_path, changes):
    make_store(tmp_path, identity_of(), TargetSpec())
    path = tmp_path / "store.json"
    fields = json.loads(path.read_text())
    for identity in (fields["identity"] | changes, [], None):
        path.write_text(json.dumps(fields | {"identity": identity}))
        with pytest.raises(DataError, match="store of targets"):
            open_store(tmp_path)


def damage(path, where):
    data = bytearray(path.read_bytes())
    data[where if where >= 0 else len(data) + where] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    (key,) = fill(store, [1])
    store.flush()
    (shard,) = tmp_path.glob("*.arrow")
    hidden = store.get(key, 24).arrays["hidden"]
    place = shard.read_bytes().index(hidden.tobytes())
    damage(shard, place + 100)
    with pytest.raises(DataError, match="checksum"):
        open_store(tmp_path).get(key, 24)


@pytest.mark.parametrize("suffix", ["arrow", "keys"])
def test_a_file_that_was_cut_short_is_noticed(tmp_path, suffix):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    fill(store, range(3))
    store.flush()
    (path,) = tmp_path.glob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=path.name):
        open_store(tmp_path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from megatron_mlr1.errors import MachineError
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.store import make_store
from tests.support.teacher_targets import identity_of
from tests.teacher.test_store import fill
store = make_store(Path(sys.argv[1]), identity_of(), TargetSpec())
fill(store, range(2))
store.flush()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a file cannot become larger
try:
    fill(store, range(2, 100))
except MachineError as error:
    sys.exit(f"told: {error}")
"""


def test_a_full_disk_is_one_clear_error_and_leaves_what_was_finished(tmp_path):
    program = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"told: {tmp_path}: File too large")
    assert list(tmp_path.glob(f"*{PARTIAL}")) == []
    assert open_store(tmp_path).num_records == 2


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="room"):
        make_store(tmp_path / "file" / "store", identity_of(), TargetSpec())


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    import os
    import time

    fresh, old = tmp_path / f"a{PARTIAL}", tmp_path / f"b{PARTIAL}"
    for path in (fresh, old):
        path.write_text("")
    past = time.time() - ABANDONED_S - 10
    os.utime(old, (past, past))
    sweep(tmp_path)
    assert fresh.exists()
    assert not old.exists()


def test_any_reader_of_arrow_sees_rows_of_tokens(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec(form="top_k", k=4))
    fill(store, range(3))
    store.flush()
    (path,) = tmp_path.glob("*.arrow")
    table = pa.ipc.open_file(path).read_all()
    assert table.num_rows == 3 * 24
    assert table.column_names == ["ids_low", "ids_high", "weights", "tail", "entropy"]


def test_reading_maps_the_file_and_copies_no_states(tmp_path):
    store = make_store(tmp_path, identity_of(), TargetSpec())
    (key,) = fill(store, [1])
    store.flush()
    (index,) = tmp_path.glob("*.keys")
    before = pa.total_allocated_bytes()
    shard = Shard(index)
    hidden = open_store(tmp_path).get(key, 24).arrays["hidden"]
    assert len(shard) == 1
    assert not hidden.flags.owndata
    assert not hidden.flags.writeable
    assert pa.total_allocated_bytes() - before < hidden.nbytes
