"""From flags to what a teacher's client must know."""

from argparse import Namespace

import pytest

from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.engine.teacher_choice import (
    find_keys,
    objective,
    policy,
    target_spec,
    teacher_options,
)
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.teacher.keys import make_pair


@pytest.fixture
def keys(tmp_path):
    make_pair(tmp_path / "keys", "pool")
    make_pair(tmp_path / "keys" / "students", "one")
    return tmp_path / "keys"


def test_a_folder_with_one_student_is_enough(keys):
    expected = keys / "students" / "one.key_secret", keys / "pool.key"
    assert find_keys(keys) == expected
    assert find_keys(keys / "students" / "one.key_secret") == expected


def test_a_folder_with_several_students_must_be_told_which(keys):
    make_pair(keys / "students", "two")
    with pytest.raises(ConfigError, match=r"2 students \(students/one.key_secret, students/two"):
        find_keys(keys)
    assert find_keys(keys / "students" / "two.key_secret")[0].stem == "two"


def test_what_a_student_alone_was_given_is_enough(keys, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (keys / "students" / "one.key_secret").rename(own / "one.key_secret")
    with pytest.raises(ConfigError, match=r"no pool\.key beside or above"):
        find_keys(own)
    (keys / "pool.key").rename(own / "pool.key")
    assert find_keys(own) == (own / "one.key_secret", own / "pool.key")


def test_keys_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="0 students"):
        find_keys(tmp_path)
    with pytest.raises(ConfigError, match="is not there"):
        find_keys(tmp_path / "none.key_secret")


def test_the_teacher_sees_documents_as_the_student_does():
    options = DistillationOptions(teacher="t", form="top_k", k=8, temperature=2.0, bos="inject")
    spec = target_spec(Namespace(dataloader_inter_document_masking=True), options)
    assert (spec.attention, spec.bos, spec.k, spec.temperature) == ("documents", "inject", 8, 2.0)
    assert objective(options).temperature == 2.0
    plain = DistillationOptions(teacher="t", temperature=2.0)
    spec = target_spec(Namespace(dataloader_inter_document_masking=False), plain)
    assert (spec.attention, spec.temperature) == ("full", 1.0)


def test_hold_never_goes_on_without_a_teacher():
    hold = policy(DistillationOptions(teacher="t", hold_limit_s=60))
    assert (hold.limit_s, hold.ce_only_after_s, hold.ce_only_steps) == (60, None, 0)
    without = policy(DistillationOptions(teacher="t", without_teacher="ce_only", ce_only_budget=5))
    assert (without.ce_only_after_s, without.ce_only_steps) == (30, 5)


def test_another_kind_of_tokenizer_cannot_be_compared():
    args = Namespace(
        dataloader_inter_document_masking=False, bf16=False, tokenizer_type="NullTokenizer"
    )
    options = DistillationOptions(teacher="tcp://a:1")
    with pytest.raises(ConfigError, match="--tokenizer-type is NullTokenizer"):
        teacher_options(args, options, fingerprint="", student="s")
