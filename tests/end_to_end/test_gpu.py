"""What CPU mode computes, a GPU computes: from the same checkpoint, with and without
Transformer Engine; what a GPU computes once, it computes a hundred times; and the head keeps to its
memory."""

import pytest
import torch

from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, distillation_loss
from megatron_mlr1.losses.language_model import linear_language_model_loss
from megatron_mlr1.losses.vocab_parallel import Foreseen, TensorParallel
from megatron_mlr1.ops.linear_kl import Head
from megatron_mlr1.ops.swiglu import swiglu
from tests.end_to_end.conftest import FIRST, LAST, exact, record

pytestmark = pytest.mark.gpu

TORCH = ("--transformer-impl", "local", "--no-rope-fusion", "--no-masked-softmax-fusion")


NEW_NUMBERS = "random numbers start anew on a GPU"


def largest_difference(save, reference):
    ours, theirs = exact(save), exact(reference)
    assert set(ours) == set(range(FIRST + 1, LAST + 1))
    return max(abs(row[0] - theirs[step][0]) / theirs[step][0] for step, row in ours.items())


def test_torch_modules_give_the_cpus_losses(train, single, from_step_five):
    save = from_step_five("torch")
    done = train(save, *TORCH, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert "CPU mode" not in done.output
    assert NEW_NUMBERS in done.output
    assert largest_difference(save, single) < 1e-3


def test_masked_documents_train(train, from_step_five):
    save = from_step_five("masked")
    done = train(save, *TORCH, "--dataloader-inter-document-masking", gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert record(save)[LAST]["lm loss"] < record(save)[FIRST + 1]["lm loss"]


@pytest.mark.te
def test_transformer_engine_reads_what_torch_modules_wrote(train, single, from_step_five):
    save = from_step_five("te")
    done = train(save, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert largest_difference(save, single) < 1e-3


@pytest.mark.te
def test_torch_modules_read_what_transformer_engine_wrote(train, single, from_step_five):
    save = from_step_five("both")
    words = ("--save-interval", "15", "--exit-interval", "15")
    assert train(save, *words, gpu=True).code == 0
    done = train(save, *TORCH, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert NEW_NUMBERS not in done.output
    assert largest_difference(save, single) < 1e-3


def test_a_run_on_a_gpu_goes_on_from_its_own_checkpoint(train, single, from_step_five):
    save = from_step_five("again")
    words = ("--save-interval", "15", "--exit-interval", "15")
    assert train(save, *TORCH, *words, gpu=True).code == 0
    done = train(save, *TORCH, gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert NEW_NUMBERS not in done.output
    assert largest_difference(save, single) < 1e-3
    assert record(save)[LAST]["peak_memory_bytes"] > 0


@pytest.fixture(scope="module")
def inputs():
    """Hidden states, heads and labels of a student and a teacher, with a third of them masked."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    tokens, ids = 515, 4104
    labels = torch.randint(0, ids, (tokens,), device="cuda")
    mask = (torch.arange(tokens, device="cuda") % 3 > 0).int()
    student = normal(tokens, 576).requires_grad_(), (normal(ids, 576) / 24).requires_grad_()
    teacher = normal(tokens, 1024), normal(ids, 1024) / 32
    return student, teacher, labels, mask


def cross_entropy(inputs):
    (hidden, weight), _, labels, mask = inputs
    parallel = TensorParallel(group=None, num_ids=len(weight))
    loss = linear_language_model_loss(hidden, weight, labels, mask, parallel=parallel)
    return (loss.total, *torch.autograd.grad(loss.total, (hidden, weight)))


def divergence(inputs):
    (hidden, weight), (teacher_hidden, teacher_weight), labels, mask = inputs
    loss = distillation_loss(
        Head(hidden=hidden, weight=weight),
        Lesson(targets=HiddenTargets(hidden=teacher_hidden), alpha=0.5),
        labels,
        mask,
        teacher_weight=teacher_weight,
        parallel=TensorParallel(group=None, num_ids=len(weight)),
    )
    return (loss.total, *torch.autograd.grad(loss.total, (hidden, weight)))


def activation(inputs):
    gate_up = inputs[0][0]
    out = swiglu(gate_up, kernel="mlr1")
    return out, *torch.autograd.grad(out.float().sum(), gate_up)


@pytest.mark.parametrize("compute", [cross_entropy, divergence, activation])
def test_a_hundred_runs_give_equal_bits(compute, inputs):
    first = compute(inputs)
    assert all(tensor.isfinite().all() for tensor in first)
    for _ in range(99):
        assert all(map(torch.equal, first, compute(inputs)))


def test_the_head_of_the_950m_takes_less_than_2_gb_beside_its_gradient():
    tokens, ids, width = 32_768, 128_256, 1536
    hidden, weight = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for rows in (tokens, ids)
    )
    hidden, weight = hidden.requires_grad_(), weight.div_(40).requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    labels = torch.randint(0, ids, (tokens,), device="cuda")
    one, parallel = torch.ones((), device="cuda"), TensorParallel(group=None, num_ids=ids)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_language_model_loss(
        hidden,
        weight,
        labels,
        torch.ones_like(labels),
        parallel=parallel,
        deliver=Foreseen(factor=one, into=main_grad, arrived=lambda _: None),
    ).total.backward()
    assert torch.cuda.max_memory_allocated() - before < 2e9
    assert main_grad.isfinite().all()
    assert main_grad.any()
