import re

import pytest

from megatron_mlr1.errors import ConfigError, DataError, TeacherError
from megatron_mlr1.teacher.addresses import TeacherOptions, open_backend
from megatron_mlr1.teacher.client import ClientOptions, ServedTeacher
from megatron_mlr1.teacher.connection import Wanted
from megatron_mlr1.teacher.in_process import InProcessTeacher, NullTeacher
from megatron_mlr1.teacher.pool import FolderPool
from megatron_mlr1.teacher.spec import TargetSpec
from megatron_mlr1.teacher.store import StoredTeacher
from megatron_mlr1.teacher.tiered import TieredTeacher
from tests.support.teacher_pool import learn, pool_of, reference, shared_nursery


def options(address, wanted=None, **more):
    return TeacherOptions(
        address=str(address),
        spec=more.pop("spec", TargetSpec()),
        wanted=wanted or Wanted(vocab_size=256),
        client=ClientOptions(),
        **more,
    )


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with pool_of(shared_nursery(), tmp_path_factory.mktemp("addresses") / "pool", 1) as pool:
        yield pool


@pytest.fixture
def opened():
    backends = []

    def open_one(*args, **more):
        backends.append(open_backend(options(*args, **more)))
        return backends[-1]

    yield open_one
    for backend in backends:
        backend.close()


def test_a_pool_is_named_by_its_folder_or_its_addresses(pool, opened):
    (lease,) = FolderPool(pool.folder).leases()
    for address in (pool.folder, lease.endpoint):
        teacher = opened(address)
        assert isinstance(teacher, ServedTeacher)
        assert learn(teacher, range(5)) == reference(5)


def test_a_tiered_teacher_makes_a_store_that_stands_alone(pool, opened, tmp_path):
    folder = tmp_path / "store"
    first = opened(f"tiered:{folder},+{pool.folder}")
    assert isinstance(first, TieredTeacher)
    assert learn(first, range(5)) == reference(5)
    first.flush()
    second = opened(f"tiered:{folder},+{pool.folder}")
    assert learn(second, range(8)) == reference(8)
    assert second.statistics()["from_store"] == 5
    stored = opened(f"store:{folder}")
    assert isinstance(stored, StoredTeacher)
    assert learn(stored, range(5)) == reference(5)
    with pytest.raises(TeacherError, match="another teacher"):
        opened(f"store:{folder}", Wanted(vocab_size=128_256))
    with pytest.raises(TeacherError, match="another teacher"):
        opened(f"tiered:{folder},+{pool.folder}", Wanted(tokenizer_sha256="0" * 64))
    with pytest.raises(TeacherError, match="has one form"):
        opened(f"store:{folder}", spec=TargetSpec(form="top_k", k=2))


@pytest.mark.usefixtures("one_thread")
def test_a_teacher_in_this_process_is_named_by_its_folder(opened):
    teacher = opened(f"inprocess:{shared_nursery().model}", dtype="float32")
    assert isinstance(teacher, InProcessTeacher)
    assert learn(teacher, range(5)) == reference(5)


def test_the_null_teacher_is_named_by_its_sizes(opened):
    teacher = opened("null:1000,8")
    assert isinstance(teacher, NullTeacher)
    assert teacher.identity.vocab_size == 1000


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("store:", ConfigError, "names no teacher"),
        ("tiered:somewhere", ConfigError, "tiered:DIR,+POOL"),
        ("null:12", ConfigError, "two sizes"),
        ("store:/nowhere", DataError, "store of targets"),
        ("/nowhere/pool", TeacherError, "no folder"),
        ("tcp://nowhere", TeacherError, "no address"),
    ],
)
def test_an_address_that_names_nothing_is_refused(address, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        open_backend(options(address))


def test_one_key_without_the_other_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="both or none"):
        options("tcp://h:1", key=tmp_path / "student.key_secret")
