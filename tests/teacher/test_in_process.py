import logging

import pytest
import torch

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.teacher.in_process import InProcessTeacher, NullTeacher
from megatron_mlr1.teacher.model import load_teacher
from megatron_mlr1.teacher.spec import bytes_per_token
from tests.support.teacher_pool import (
    VOCABULARY,
    client_of,
    learn,
    pool_of,
    reference,
    sequence,
    shared_nursery,
)
from tests.support.teacher_targets import FORMS, random_request


@pytest.mark.usefixtures("one_thread")
def test_a_teacher_in_this_process_gives_the_bits_of_a_pool(tmp_path):
    nursery = shared_nursery()
    teacher = InProcessTeacher(load_teacher(nursery.model, torch.device("cpu"), "float32"))
    assert teacher.identity == nursery.identity
    assert learn(teacher, range(10)) == reference(10)
    with pool_of(nursery, tmp_path / "pool", 1) as pool, client_of(pool) as client:
        assert (client.head(0, VOCABULARY) == teacher.head(0, VOCABULARY)).all()
    with pytest.raises(TeacherError, match="512"):
        teacher.submit(sequence(0, length=600), 0)
    with pytest.raises(TeacherError, match=f"{VOCABULARY} rows"):
        teacher.head(5, VOCABULARY + 1)


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.form)
def test_the_null_teacher_has_the_shape_of_a_teacher_and_says_that_it_is_none(spec, caplog):
    with caplog.at_level(logging.WARNING):
        teacher = NullTeacher(128_256, 64)
    assert "learns nothing" in caplog.text
    assert "NOT-A-TEACHER" in teacher.identity.name
    request = random_request(0, spec)
    one = teacher.fetch(teacher.submit(request, 0), 0)  # checked by the interface
    assert one.num_bytes == request.rows * bytes_per_token(spec, teacher.identity)
    assert teacher.fetch(teacher.submit(request, 1), 0) is one
    assert teacher.head(7, 20).shape == (13, 64)


def test_a_null_teacher_without_size_is_refused():
    with pytest.raises(ConfigError, match="null:0,64"):
        NullTeacher(0, 64)
