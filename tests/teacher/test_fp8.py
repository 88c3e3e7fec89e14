import numpy as np
import pytest
import torch
from torch import nn

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher.content_key import content_key
from megatron_mlr1.teacher.fp8 import (
    LARGEST,
    OLDEST_GPU,
    Drift,
    Fp8Linear,
    load_fp8_teacher,
    measure,
    quantise,
    quantise_rows,
)
from megatron_mlr1.teacher.fp8_gate import Gate
from megatron_mlr1.teacher.model import load_teacher
from megatron_mlr1.teacher.spec import TargetSpec
from tests.support.teachers import make_request, make_teacher_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of 700 words that the small teacher's tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(2, 256, 700)))
    return path


@pytest.fixture(scope="module")
def fp8(teacher_folder, words):
    return load_fp8_teacher(teacher_folder, CPU, open_gate(words))


def open_gate(text=None):
    return Gate(max_kl=10.0, min_agreement=0.0, text=text)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (41, 176)], ids=str)
def test_rows_are_quantised_to_four_bits_of_themselves(shape):
    rows = random(*shape) * torch.logspace(-20, 20, shape[0])[:, None]
    levels, scale = quantise_rows(rows)
    assert levels.dtype == torch.float8_e4m3fn
    assert (levels.float().abs().amax(-1) == LARGEST).all()
    # Half of the last of four bits, and half of the smallest number of all.
    room = rows.abs() * 2**-4 + scale * 2**-10
    assert ((levels.float() * scale - rows).abs() <= room).all()


def test_a_row_of_zeros_and_a_row_that_is_not_finite_stay_what_they_are():
    levels, scale = quantise_rows(torch.tensor([[0.0, 0.0], [1.0, float("inf")]]))
    back = levels.float() * scale
    assert (back[0] == 0).all()
    assert not torch.isfinite(back[1]).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3)], ids=str)
def test_a_layer_gives_the_products_of_the_quantised_numbers(shape, bias):
    linear = nn.Linear(48, 32, bias=bias)
    inputs = random(*shape, 48, seed=1)
    x, s = quantise_rows(inputs)
    w, t = quantise_rows(linear.weight.detach())
    wanted = (x.double() * s.double()) @ (w.double() * t.double()).T
    if bias:
        wanted = wanted + linear.bias.double()
    found = Fp8Linear(linear)(inputs)
    assert found.shape == (*shape, 32)
    assert torch.allclose(found.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    exact = linear(inputs).detach()
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 37, 1024])
def test_a_gpu_gives_the_products_of_the_definition_and_the_same_bits_each_time(tokens):
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        pytest.skip("this GPU has no products of E4M3")
    layer = Fp8Linear(nn.Linear(256, 176, bias=False, dtype=torch.bfloat16))
    inputs = random(tokens, 256, dtype=torch.bfloat16)
    wanted = layer(inputs).float()
    there = layer.to("cuda")
    found = [there(inputs.cuda()) for _ in range(10)]
    assert all(torch.equal(found[0], other) for other in found[1:])
    # Sums in another order, rounded to the 8 bits of bf16.
    assert torch.allclose(found[0].float().cpu(), wanted, rtol=2**-6, atol=2**-6)


def test_a_layer_does_not_mix_tokens():
    layer, inputs = Fp8Linear(nn.Linear(64, 16)), random(9, 64)
    moved = inputs.clone()
    moved[4] *= 1000
    before, after = layer(inputs), layer(moved)
    others = torch.arange(9) != 4
    assert torch.equal(before[others], after[others])


def test_layers_of_odd_sizes_are_left_alone():
    body = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24), nn.Sequential(nn.Linear(24, 16)))
    assert quantise(body) == 1
    assert [type(child) for child in body] == [Fp8Linear, nn.Linear, nn.Sequential]


def test_the_head_and_the_type_of_the_states_stay(fp8, teacher_folder):
    teacher, drift = fp8
    plain = load_teacher(teacher_folder, CPU, "bfloat16")
    assert torch.equal(teacher.head, plain.head)
    kinds = {type(module) for module in teacher.body.modules()}
    assert Fp8Linear in kinds
    assert nn.Linear not in kinds
    request = make_request((20, 13), TargetSpec())
    one, other = (x.targets(request, b"").arrays["hidden"] for x in (teacher, plain))
    assert one.dtype == other.dtype == np.dtype("<u2")
    assert not np.array_equal(one, other)
    assert 0 < drift.kl < 10


def test_it_is_another_teacher_than_the_same_in_bf16(fp8, teacher_folder):
    identity = fp8[0].identity
    plain = load_teacher(teacher_folder, CPU, "bfloat16").identity
    assert identity.fingerprint != plain.fingerprint
    assert "fp8-e4m3" in identity.numerics
    assert identity.dtype == plain.dtype == "bfloat16"
    request = make_request((9,), TargetSpec())
    assert content_key(identity, request) != content_key(plain, request)
    again, _ = load_fp8_teacher(teacher_folder, CPU, open_gate())
    assert again.identity == identity


def test_what_fp8_changes_is_measured_over_all_ids():
    before, after, head = random(300, 16), random(300, 16, seed=1), random(50, 16, seed=2)
    logp, logq = ((x.double() @ head.double().T).log_softmax(-1) for x in (before, after))
    kl = (logp.exp() * (logp - logq)).sum(-1).mean()
    same = (logp.argmax(-1) == logq.argmax(-1)).double().mean()
    drift = measure(before, after, head)
    assert drift.kl == pytest.approx(float(kl), rel=1e-4)
    assert drift.agreement == pytest.approx(float(same))
    assert measure(before, before, head) == Drift(kl=0.0, agreement=1.0, tokens=300)


def test_a_teacher_that_fp8_changes_too_much_does_not_serve(fp8, teacher_folder, words):
    drift = fp8[1]
    assert drift.tokens == 700
    assert drift.agreement < 1
    for limits in ({"max_kl": drift.kl / 2}, {"min_agreement": 1.0}):
        gate = Gate(**({"max_kl": 10.0, "min_agreement": 0.0, "text": words} | limits))
        with pytest.raises(TeacherError, match=r"nats a token and keeps .* 700 tokens; at most"):
            load_fp8_teacher(teacher_folder, CPU, gate)


def test_figures_that_are_no_numbers_do_not_pass():
    nan = float("nan")
    assert Drift(kl=0.5, agreement=0.5, tokens=9).passes(open_gate())
    assert not Drift(kl=nan, agreement=0.5, tokens=9).passes(open_gate())


@pytest.mark.parametrize("text", [None, "w5"])
def test_a_text_that_says_nothing_is_refused(teacher_folder, tmp_path, text):
    path = tmp_path / "text"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TeacherError, match="--fp8-text"):
        load_fp8_teacher(teacher_folder, CPU, Gate(text=path))


def test_a_teacher_without_layers_for_it_is_refused(tmp_path):
    folder = make_teacher_folder(
        tmp_path / "odd", hidden_size=40, intermediate_size=72, head_dim=10
    )
    with pytest.raises(TeacherError, match="multiples of 16"):
        load_fp8_teacher(folder, CPU, open_gate())
