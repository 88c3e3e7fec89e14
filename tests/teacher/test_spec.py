import numpy as np
import pytest

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.spec import (
    SPEC_BYTES,
    TargetRequest,
    Targets,
    TargetSpec,
    bytes_per_token,
    layout,
)
from tests.support.teachers import TableTeacher, make_request

IDENTITY = TableTeacher().identity
FORMS = [
    TargetSpec(),
    TargetSpec(form="hidden_int8", seed=2**64 - 1, attention="full", bos="inject"),
    TargetSpec(form="top_k", k=5, temperature=2.0),
    TargetSpec(form="hybrid", k=4, m=3, seed=7, bos="require"),
]


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.form)
def test_a_spec_is_read_as_it_was_packed(spec):
    packed = spec.pack()
    assert len(packed) == SPEC_BYTES
    assert TargetSpec.unpack(packed) == spec


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "logits"},
        {"attention": "sliding"},
        {"bos": "maybe"},
        {"k": 3},
        {"form": "top_k"},
        {"form": "top_k", "k": 4, "m": 1},
        {"form": "hybrid", "k": 4},
        {"form": "top_k", "k": 2**16},
        {"seed": 1},
        {"temperature": 2.0},
        {"form": "top_k", "k": 2, "temperature": float("nan")},
    ],
    ids=str,
)
def test_a_spec_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(TeacherError):
        TargetSpec(**wrong)


@pytest.mark.parametrize("packed", [b"", bytes(27), b"\xff" * 28, bytes(24)])
def test_bytes_that_are_no_spec_are_refused(packed):
    with pytest.raises(TeacherError):
        TargetSpec.unpack(packed)


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [
        (np.zeros(0, "<i4"), np.array([0, 0], "<i4")),
        (np.zeros(4, "<i4"), np.array([0], "<i4")),
        (np.zeros(4, "<i4"), np.zeros(0, "<i4")),
        (np.zeros(4, "<i4"), np.array([0, 3], "<i4")),
        (np.zeros(4, "<i4"), np.array([1, 4], "<i4")),
        (np.zeros(4, "<i4"), np.array([0, 2, 2, 4], "<i4")),
        (np.zeros(4, "<i4"), np.array([0, 3, 2, 4], "<i4")),
        (np.zeros(4, "<i8"), np.array([0, 4], "<i4")),
        (np.zeros(8, "<i4")[::2], np.array([0, 4], "<i4")),
        (np.array([1, -1], "<i4"), np.array([0, 2], "<i4")),
    ],
    ids=str,
)
def test_a_request_that_is_no_sequence_of_documents_is_refused(tokens, bounds):
    with pytest.raises(TeacherError):
        TargetRequest(tokens, bounds, TargetSpec())


def test_bytes_of_a_token_are_those_of_the_design_at_the_real_widths():
    import dataclasses

    llama = dataclasses.replace(IDENTITY, hidden_size=4096, vocab_size=128256, dtype="bfloat16")
    assert bytes_per_token(TargetSpec(), llama) == 8192
    assert bytes_per_token(TargetSpec(form="hidden_int8"), llama) == 4100
    assert bytes_per_token(TargetSpec(form="top_k", k=64), llama) == 64 * 8 + 8
    assert bytes_per_token(TargetSpec(form="hybrid", k=32, m=16), llama) == 32 * 8 + 16 * 4 + 8


def sound(spec, rows=3):
    return {a.name: np.zeros(a.shape, a.dtype) for a in layout(spec, IDENTITY, rows)}


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.form)
def test_targets_of_the_right_shape_and_range_pass(spec):
    targets = Targets(spec, sound(spec))
    targets.check(IDENTITY, 3)
    assert targets.rows == 3
    assert targets.num_bytes == 3 * bytes_per_token(spec, IDENTITY)


@pytest.mark.parametrize(
    ("spec", "name", "value"),
    [
        (FORMS[0], "hidden", np.nan),
        (FORMS[0], "hidden", np.inf),
        (FORMS[1], "scale", -1.0),
        (FORMS[2], "ids", 256),
        (FORMS[2], "ids", -1),
        (FORMS[2], "weights", 1.5),
        (FORMS[3], "tail", np.nan),
        (FORMS[3], "entropy", -1.0),
    ],
    ids=str,
)
def test_targets_outside_of_their_range_are_refused(spec, name, value):
    arrays = sound(spec)
    arrays[name].flat[1] = value
    with pytest.raises(TeacherError, match=name):
        Targets(spec, arrays).check(IDENTITY, 3)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF])
@pytest.mark.parametrize("others", [(0x7F7F,), (0xFF7F,), (0x7F7F, 0xFF7F), (0, 0x8000)])
def test_bfloat16_that_is_not_finite_is_refused(bits, others):
    import dataclasses

    half = dataclasses.replace(IDENTITY, dtype="bfloat16")
    # 0x7F7F is the largest finite number, 0xFF7F the smallest, 0x8000 is -0.
    arrays = {"hidden": np.resize(np.array(others, "<u2"), (3, 8))}
    Targets(TargetSpec(), arrays).check(half, 3)
    arrays["hidden"][2, 7] = bits
    with pytest.raises(TeacherError, match="hidden"):
        Targets(TargetSpec(), arrays).check(half, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_number_that_is_none_is_found_among_many(dtype):
    import dataclasses

    identity, rows = dataclasses.replace(IDENTITY, dtype=dtype), 40_000
    for place in (0, 2**17 - 1, 2**17, 8 * rows - 1):
        hidden = np.zeros((rows, 8), identity.state_dtype)
        Targets(TargetSpec(), {"hidden": hidden}).check(identity, rows)
        hidden.flat[place] = 0x7FC0 if dtype == "bfloat16" else np.nan
        with pytest.raises(TeacherError, match="hidden"):
            Targets(TargetSpec(), {"hidden": hidden}).check(identity, rows)


def test_targets_of_another_shape_are_refused():
    targets = Targets(TargetSpec(), {"hidden": np.zeros((3, 7), "<f4")})
    with pytest.raises(TeacherError, match="they must be"):
        targets.check(IDENTITY, 3)


def test_a_part_is_a_view_of_its_rows():
    arrays = {"hidden": np.arange(24, dtype="<f4").reshape(3, 8)}
    part = Targets(TargetSpec(), arrays).part(1, 3)
    assert part.rows == 2
    assert np.shares_memory(part.arrays["hidden"], arrays["hidden"])


def test_a_request_has_a_row_for_each_token():
    assert make_request((3, 4), TargetSpec()).rows == 7
