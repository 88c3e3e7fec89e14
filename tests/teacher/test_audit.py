import numpy as np
import pytest

from megatron_mlr1.teacher.audit import bits, odd_one_out
from megatron_mlr1.teacher.spec import Targets, TargetSpec

SPEC = TargetSpec()
RIGHT = np.arange(12, dtype="<f4").reshape(3, 4)


def targets(array):
    return Targets(SPEC, {"hidden": array})


def changed():
    wrong = RIGHT.copy()
    wrong[2, 1] = np.nextafter(wrong[2, 1], np.float32(100))
    return wrong


def test_one_bit_is_a_difference():
    assert bits(targets(RIGHT)) == bits(targets(RIGHT.copy()))
    assert bits(targets(RIGHT)) != bits(targets(changed()))


@pytest.mark.parametrize("odd", ["a", "b", "c"])
def test_two_against_one_name_the_one(odd):
    answers = {name: targets(changed() if name == odd else RIGHT) for name in "abc"}
    assert odd_one_out(answers) == odd


def test_nobody_is_odd_where_all_agree_or_nobody_can_tell():
    assert odd_one_out({name: targets(RIGHT) for name in "abc"}) is None
    assert odd_one_out({"a": targets(RIGHT), "b": targets(changed())}) is None
    three = {"a": targets(RIGHT), "b": targets(changed()), "c": targets(RIGHT + 1)}
    assert odd_one_out(three) is None
