import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.engine import RequestError
from megatron_mlr1.teacher.model import load_teacher, view
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec
from megatron_mlr1.teacher.wire import Code
from tests.support.teachers import BOS, VOCABULARY, make_request, make_teacher_folder

CPU = torch.device("cpu")
LENGTHS = (20, 1, 33, 10)


def hidden(teacher, request):
    targets = teacher.targets(request, content_key(teacher.identity, request))
    targets.check(teacher.identity, request.rows)
    return targets.arrays["hidden"]


def part(request, number):
    """One document of a request as a request of its own."""
    begin, end = request.bounds[number : number + 2]
    bounds = np.array([0, end - begin], "<i4")
    return TargetRequest(request.tokens[begin:end].copy(), bounds, request.spec)


def with_bos(tokens, bounds):
    """Put a BOS before each document, by the plainest loop."""
    pieces = [tokens[a:b] for a, b in itertools.pairwise(bounds)]
    joined = [[BOS, *piece] for piece in pieces]
    return np.concatenate(joined).astype("<i4"), np.cumsum([0, *map(len, joined)]).astype("<i4")


def test_the_head_times_the_rows_is_the_models_logits(tiny_teacher, teacher_folder):
    request = make_request((50,), TargetSpec())
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(request.tokens.astype("i8"))[None]).logits[0].numpy()
    head = tiny_teacher.head_rows(0, VOCABULARY)
    np.testing.assert_allclose(hidden(tiny_teacher, request) @ head.T, logits, atol=2e-5)
    np.testing.assert_array_equal(tiny_teacher.head_rows(7, 9), head[7:9])


def test_packed_documents_have_the_rows_of_the_documents_alone(tiny_teacher):
    request = make_request(LENGTHS, TargetSpec())
    packed = hidden(tiny_teacher, request)
    alone = [hidden(tiny_teacher, part(request, number)) for number in range(len(LENGTHS))]
    scale = np.abs(packed).max()
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=0, atol=1e-6 * max(scale, 1))


def test_a_changed_document_leaves_the_rows_of_the_others_as_they_are(tiny_teacher):
    request = make_request(LENGTHS, TargetSpec())
    tokens = request.tokens.copy()
    tokens[20:54] = tokens[20:54][::-1]
    changed = TargetRequest(tokens, request.bounds, request.spec)
    before, after = hidden(tiny_teacher, request), hidden(tiny_teacher, changed)
    assert before[:20].tobytes() == after[:20].tobytes()
    assert before[54:].tobytes() == after[54:].tobytes()
    assert not np.array_equal(before[20:54], after[20:54])


def test_full_attention_lets_documents_see_those_before_them(tiny_teacher):
    documents = hidden(tiny_teacher, make_request(LENGTHS, TargetSpec()))
    full = hidden(tiny_teacher, make_request(LENGTHS, TargetSpec(attention="full")))
    one = make_request((sum(LENGTHS),), TargetSpec())
    assert full.tobytes() == hidden(tiny_teacher, one).tobytes()
    np.testing.assert_allclose(full[:20], documents[:20], rtol=0, atol=1e-5)
    assert np.abs(full[21:] - documents[21:]).max() > 0.01


@pytest.mark.parametrize("attention", ["documents", "full"])
def test_an_injected_bos_leaves_a_row_for_each_token(tiny_teacher, attention):
    request = make_request(LENGTHS, TargetSpec(bos="inject", attention=attention))
    tokens, bounds = with_bos(request.tokens, request.bounds)
    shown = TargetRequest(tokens, bounds, TargetSpec(attention=attention))
    expected = hidden(tiny_teacher, shown)[tokens != BOS]
    assert hidden(tiny_teacher, request).tobytes() == expected.tobytes()


def test_a_bos_is_injected_only_where_there_is_none():
    tokens = np.array([BOS, 5, 6, 7, BOS], "<i4")
    request = TargetRequest(tokens, np.array([0, 2, 4, 5], "<i4"), TargetSpec(bos="inject"))
    seen = view(request, BOS)
    assert seen.tokens.tolist() == [BOS, 5, BOS, 6, 7, BOS]
    assert seen.bounds.tolist() == [0, 2, 5, 6]
    assert seen.rows.tolist() == [0, 1, 3, 4, 5]
    assert seen.tokens[seen.rows].tolist() == tokens.tolist()


def test_a_required_bos_that_is_missing_is_an_error(tiny_teacher):
    request = make_request((3, 4), TargetSpec(bos="require"))
    with pytest.raises(RequestError, match="at token 0") as error:
        tiny_teacher.refuse(request)
    assert error.value.code is Code.WRONG_REQUEST
    tokens = request.tokens.copy()
    tokens[[0, 3]] = BOS
    tiny_teacher.refuse(TargetRequest(tokens, request.bounds, request.spec))
    with pytest.raises(RequestError, match="no BOS"):
        view(request, None)


@pytest.mark.parametrize(
    "request_",
    [
        TargetRequest(np.array([VOCABULARY], "<i4"), np.array([0, 1], "<i4"), TargetSpec()),
        make_request((513,), TargetSpec()),
        make_request((512,), TargetSpec(bos="inject")),
        make_request((4,), TargetSpec(form="top_k", k=VOCABULARY + 1)),
    ],
    ids=["outside the vocabulary", "too long", "too long with its BOS", "too many ids"],
)
def test_a_request_that_the_teacher_cannot_answer_is_refused(tiny_teacher, request_):
    with pytest.raises(RequestError) as error:
        tiny_teacher.refuse(request_)
    assert error.value.code is Code.WRONG_REQUEST


def test_states_that_are_not_finite_are_an_error(teacher_folder):
    teacher = load_teacher(teacher_folder, CPU, "float32")
    with torch.no_grad():
        teacher.body.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    with pytest.raises(RequestError) as error:
        hidden(teacher, make_request((9,), TargetSpec()))
    assert error.value.code is Code.NOT_FINITE


def test_a_folder_whose_weights_are_no_numbers_is_refused(tmp_path):
    folder = make_teacher_folder(tmp_path / "nan")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][200, 3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="NaN or Inf on a short text"):
        load_teacher(folder, CPU, "float32")


def test_states_in_bfloat16_come_as_their_bits(teacher_folder, tiny_teacher):
    half = load_teacher(teacher_folder, CPU, "bfloat16")
    request = make_request((30,), TargetSpec())
    bits = hidden(half, request)
    assert bits.dtype == np.uint16
    assert half.head_rows(0, 2).dtype == np.uint16
    wide = (bits.astype("u4") << 16).view("f4")
    np.testing.assert_allclose(wide, hidden(tiny_teacher, request), atol=0.2)
    assert half.identity.fingerprint != tiny_teacher.identity.fingerprint


def answer(folder):
    """All that a replica would say to two requests, as text."""
    teacher = load_teacher(folder, CPU, "bfloat16")
    lines = [teacher.identity.fingerprint]
    for spec in (TargetSpec(), TargetSpec(form="hybrid", k=4, m=4, seed=1)):
        targets = teacher.targets(make_request(LENGTHS, spec), bytes(16))
        lines.append("".join(array.tobytes().hex() for array in targets.arrays.values()))
    return "\n".join(lines)


def test_a_fresh_process_gives_the_same_bits(teacher_folder):
    """As before and after a restart, and as any two replicas on equal machines."""
    here = answer(teacher_folder)
    words = [sys.executable, __file__, str(teacher_folder)]
    # The number of threads is part of the fingerprint, and other tests may have changed it here.
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    there = subprocess.run(
        words, stdout=subprocess.PIPE, env=environment, text=True, check=True, timeout=200
    )
    assert there.stdout.strip() == here


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("vocab_size", None, "vocab_size"),
        ("model_type", "bert", "no weights"),
        ("model_type", "none", "cannot be loaded"),
    ],
)
def test_a_folder_that_holds_no_causal_model_is_refused(tmp_path, name, value, says):
    folder = make_teacher_folder(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    config[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match=says):
        load_teacher(folder, CPU, "float32")


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    """Students could not rebuild its logits from states and head alone."""
    folder = make_teacher_folder(tmp_path / "teacher")
    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        logits_scaling=3.0,
        initializer_range=0.2,
    )
    transformers.GraniteForCausalLM(config).save_pretrained(folder)
    with pytest.raises(TeacherError, match="plain head"):
        load_teacher(folder, CPU, "float32")


def test_documents_are_refused_where_a_window_is_narrower_than_the_request(tmp_path):
    folder = make_teacher_folder(tmp_path / "teacher")
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        max_position_embeddings=128,
    )
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    teacher = load_teacher(folder, CPU, "float32")
    teacher.refuse(make_request((8, 8), TargetSpec()))
    teacher.refuse(make_request((32,), TargetSpec()))
    with pytest.raises(RequestError, match="16"):
        teacher.refuse(make_request((16, 16), TargetSpec()))


def test_a_model_that_sees_what_it_predicts_is_refused(tmp_path):
    folder = make_teacher_folder(tmp_path / "teacher")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    transformers.BertLMHeadModel(config).save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"plain head|later tokens"):
        load_teacher(folder, CPU, "float32")


if __name__ == "__main__":
    print(answer(Path(sys.argv[1])))
