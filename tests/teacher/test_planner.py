import json

import pytest

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.teacher.planner import (
    LLAMA_31_8B,
    Question,
    plan,
    report,
    shape_of_folder,
    shape_of_model,
)
from megatron_mlr1.teacher.spec import TargetSpec


def test_the_costs_are_those_of_the_models_weights():
    # Weights in the layers alone: 949,685,760 - 128,256 x 1,536 - norms, see the recipe.
    student = shape_of_model("950m")
    without_attention = student.forward_flops(0, with_head=False)
    assert without_attention == pytest.approx(2 * 752.6e6, rel=1e-3)
    assert student.forward_flops(4096, with_head=True) * 3 == pytest.approx(6.528e9, rel=1e-3)
    assert LLAMA_31_8B.forward_flops(4096, with_head=True) == pytest.approx(16.083e9, rel=1e-3)
    assert LLAMA_31_8B.forward_flops(4096, with_head=False) == pytest.approx(15.03e9, rel=1e-3)


def test_a_pool_without_waiting_for_128_gpus():
    answer = plan(Question(model="950m", student_gpus=128))
    assert answer.replicas_needed == 195
    assert (answer.sequence, answer.micro_batch, answer.token_bytes) == (4096, 4, 8192)
    assert answer.wait_share(195) == 0
    assert answer.wait_share(98) == pytest.approx(0.5, abs=0.01)


def test_half_the_replicas_halve_the_students_speed():
    rates = {"student_tokens_per_s": 1000.0, "teacher_tokens_per_s": 500.0}
    answer = plan(Question(model="140m", student_gpus=10, replicas=10, **rates))
    assert answer.replicas_needed == 20
    assert answer.wait_share(10) == 0.5
    assert "50.0%   500" in report(answer)


def test_a_sparse_form_costs_the_teacher_its_head_and_saves_the_network():
    spec = TargetSpec(form="hybrid", k=32, m=16)
    sparse = plan(Question(model="950m", student_gpus=8, spec=spec))
    exact = plan(Question(model="950m", student_gpus=8))
    assert sparse.teacher_flops - exact.teacher_flops == 2 * 128256 * 4096
    assert sparse.token_bytes < exact.token_bytes / 20


def test_the_report_names_every_quantity_that_costs_money():
    text = report(plan(Question(model="950m", student_gpus=128, replicas=100)))
    for words in ("195 (1.52", "3.93 Gbit/s", "31.5 Gbit/s", "1.07 GB", "100", "students wait"):
        assert words in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"student_gpus": 0},
        {"replicas": 0},
        {"student_tokens_per_s": 0.0},
        {"teacher_tokens_per_s": float("nan")},
        {"teacher_tokens_per_s": float("inf")},
    ],
    ids=str,
)
def test_a_question_without_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        Question(**({"model": "950m", "student_gpus": 8} | wrong))


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError):
        plan(Question(model="7b", student_gpus=8))
    with pytest.raises(ConfigError, match="tokenizer"):
        plan(Question(model="tiny", student_gpus=8))


def test_a_teachers_shape_is_read_from_its_config(tmp_path):
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of_folder(tmp_path) == LLAMA_31_8B
    wrong = (
        {},
        [],
        config | {"num_hidden_layers": "32"},
        config | {"vocab_size": 0},
        config | {"hidden_size": None},
        config | {"intermediate_size": 1.5},
    )
    for broken in wrong:
        (tmp_path / "config.json").write_text(json.dumps(broken))
        with pytest.raises(TeacherError, match="dense decoder"):
            shape_of_folder(tmp_path)
