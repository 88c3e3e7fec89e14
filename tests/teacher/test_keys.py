import os
import stat

import pytest

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher.keys import (
    make_pair,
    read_pair,
    read_pool_keys,
    read_public,
    read_student_keys,
)


def test_a_secret_is_for_its_owner_alone(tmp_path):
    old = os.umask(0)
    try:
        secret = make_pair(tmp_path / "keys", "pool")
    finally:
        os.umask(old)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700


def test_a_pair_is_read_as_it_was_made(tmp_path):
    pair = read_pair(make_pair(tmp_path, "pool"))
    assert read_public(tmp_path / "pool.key") == pair.public
    assert len(pair.public) == len(pair.secret) == 40
    assert b"secret" not in (tmp_path / "pool.key").read_bytes()


def test_a_secret_is_not_printed_by_accident(tmp_path):
    pair = read_pair(make_pair(tmp_path, "pool"))
    assert pair.secret.decode() not in repr(pair)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_secret_that_others_can_read_is_refused(tmp_path, mode):
    path = make_pair(tmp_path, "pool")
    path.chmod(mode)
    with pytest.raises(TeacherError, match="0600"):
        read_pair(path)


def test_keys_are_not_overwritten(tmp_path):
    pair = read_pair(make_pair(tmp_path, "pool"))
    with pytest.raises(TeacherError, match="already"):
        make_pair(tmp_path, "pool")
    (tmp_path / "pool.key").unlink()
    with pytest.raises(TeacherError, match="already"):
        make_pair(tmp_path, "pool")
    assert read_pair(tmp_path / "pool.key_secret") == pair


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "students"):
        with pytest.raises(MachineError, match="Not a directory"):
            make_pair(folder, "pool")


@pytest.mark.parametrize("name", ["", "../pool", "a/b", "A", "a.key"])
def test_a_name_that_could_leave_the_folder_is_refused(tmp_path, name):
    with pytest.raises(TeacherError):
        make_pair(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_public_key_is_no_secret_one(tmp_path):
    make_pair(tmp_path, "pool")
    with pytest.raises(TeacherError, match="no secret"):
        read_pair(tmp_path / "pool.key")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public-key",
        'public-key = "short"\nsecret-key = "short"\n',
        f'public-key = "{"~" * 40}"\n',
        f'public-key = "{"#" * 40}"\n',
    ],
    ids=["nothing", "no value", "too short", "no character of Z85", "five that stand for nothing"],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text):
    path = tmp_path / "pool.key_secret"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TeacherError, match=r"pool\.key_secret"):
        read_pair(path)


def test_a_file_that_is_missing_is_said_to_be_missing(tmp_path):
    with pytest.raises(TeacherError, match=r"missing\.key_secret .* no such file"):
        read_pair(tmp_path / "missing.key_secret")


def test_two_keys_that_are_no_pair_are_refused(tmp_path):
    path = make_pair(tmp_path, "pool")
    other = read_pair(make_pair(tmp_path, "other"))
    text = path.read_text().replace(read_pair(path).public.decode(), other.public.decode())
    path.write_text(text)
    with pytest.raises(TeacherError, match="no pair"):
        read_pair(path)


def test_a_pool_without_students_is_refused(tmp_path):
    make_pair(tmp_path, "pool")
    with pytest.raises(TeacherError, match="--student"):
        read_pool_keys(tmp_path)
    make_pair(tmp_path / "students", "run1")
    assert read_pool_keys(tmp_path).students == tmp_path / "students"


def test_a_student_reads_its_own_secret_and_the_pools_public_key(tmp_path):
    pool = read_pair(make_pair(tmp_path, "pool"))
    mine = read_pair(make_pair(tmp_path / "students", "run1"))
    keys = read_student_keys(tmp_path, "run1")
    assert (keys.pair, keys.pool) == (mine, pool.public)
