"""The loss head in one process: gradients, kernels, and what it refuses."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.losses.distillation import HiddenTargets, Lesson
from megatron_mlr1.model.head_kernels import HeadKernels
from megatron_mlr1.ops.linear_kl import Objective


@pytest.fixture(scope="module")
def loss_head():
    cpu.activate()
    from megatron_mlr1.model import loss_head

    return loss_head


CONFIG = {
    "use_mup": False,
    "mtp_num_layers": None,
    "defer_embedding_wgrad_compute": False,
    "cuda_graph_impl": "none",
}


@pytest.mark.parametrize(
    "change",
    [{"use_mup": True}, {"mtp_num_layers": 1}, {"defer_embedding_wgrad_compute": True}],
    ids=str,
)
def test_heads_that_do_more_are_refused_by_the_fused_loss_alone(loss_head, change):
    config = SimpleNamespace(**CONFIG | change)
    flag = next(iter(change)).replace("_", "-")
    reference = {"vocab_size": 8, "kernels": HeadKernels(cross_entropy="reference")}
    teacher = loss_head.Teacher(num_ids=8, weight=None)
    for words in ({"vocab_size": 8, "kernels": HeadKernels()}, reference | {"teacher": teacher}):
        with pytest.raises(ConfigError, match=f"--{flag}"):
            loss_head.LossHead(config, **words)
    loss_head.LossHead(config, **reference)


def call(loss_head, layer, *, config=CONFIG, hidden=None, context=None, **words):
    words = {"kernels": HeadKernels(), "vocab_size": 8} | words
    head = loss_head.LossHead(SimpleNamespace(**config), **words)
    return head(
        hidden_states=torch.randn(3, 1, 4) if hidden is None else hidden,
        output_layer=layer,
        output_weight=None,
        labels=torch.tensor([[0, 1, 2]]),
        loss_mask=torch.tensor([[1.0, 0.0, 1.0]]),
        context=context,
        compute_language_model_loss=lambda labels, logits: torch.nn.functional.cross_entropy(
            logits.permute(1, 2, 0), labels, reduction="none"
        ),
        position_ids=None,
    )


class Layer(torch.nn.Linear):
    """As the engine's output layer looks to the head."""

    def __init__(self, dtype=torch.float32):
        super().__init__(4, 8, bias=False, dtype=dtype)
        self.tp_group, self.sequence_parallel = None, False

    def forward(self, hidden, weight=None):
        return torch.nn.functional.linear(hidden, self.weight if weight is None else weight), None


FP64 = CONFIG | {
    "grad_scale_func": lambda loss: torch.tensor([4.0], dtype=torch.float64) * loss,
    "calculate_per_token_loss": False,
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_a_foreseen_gradient_is_autograds_in_the_main_gradient_before_the_backward(
    loss_head, temperature, per_token
):
    torch.manual_seed(1)
    layer, twin = Layer(torch.float64), Layer(torch.float64)
    twin.load_state_dict(layer.state_dict())
    layer.weight.main_grad = torch.ones_like(layer.weight)
    hidden = torch.randn(3, 1, 4, dtype=torch.float64)
    teacher_weight, states = torch.randn(8, 5).double(), torch.randn(3, 1, 5).double()
    lesson, teacher = None, None
    if temperature is not None:
        objective = Objective(temperature=temperature)
        lesson = Lesson(targets=HiddenTargets(hidden=states), alpha=0.3, objective=objective)
        teacher = loss_head.Teacher(num_ids=8, weight=teacher_weight)
    words = {"config": FP64 | {"calculate_per_token_loss": per_token}, "context": lesson}
    h = hidden.clone().requires_grad_()
    done = call(loss_head, layer, hidden=h, num_micro_batches=lambda: 3, teacher=teacher, **words)
    before = layer.weight.main_grad.clone()
    factor = 4.0 if per_token else 4.0 / 2 / 3
    (done.total * factor).backward()
    assert layer.weight.grad_added_to_main_grad
    assert torch.equal(layer.weight.main_grad, before)

    kernels = HeadKernels(cross_entropy="reference", divergence="reference")
    g = hidden.clone().requires_grad_()
    exact = call(loss_head, twin, hidden=g, kernels=kernels, teacher=teacher, **words)
    (exact.total * factor).backward()
    torch.testing.assert_close(done.total.double(), exact.total.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(before, 1 + twin.weight.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.grad, g.grad, rtol=1e-6, atol=1e-6)


def test_another_factor_than_was_foreseen_stops_the_backward(loss_head):
    layer = Layer()
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    config = FP64 | {"grad_scale_func": None}
    done = call(loss_head, layer, config=config, num_micro_batches=lambda: 3)
    with pytest.raises(RuntimeError, match="another factor"):
        (done.total / 2 / 4).backward()


def test_without_a_backward_nothing_joins_the_main_gradient(loss_head):
    layer = Layer()
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    with torch.no_grad():
        done = call(loss_head, layer, config=FP64, num_micro_batches=lambda: 3)
    assert done.total > 0
    assert not layer.weight.main_grad.any()


def test_a_main_gradient_in_another_type_gets_its_own_in_the_backward(loss_head):
    layer = Layer()
    layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.bfloat16)
    done = call(loss_head, layer, config=FP64, num_micro_batches=lambda: 3)
    assert not layer.weight.main_grad.any()
    (7 * done.total).backward()
    assert layer.weight.main_grad.any()


@pytest.mark.parametrize("kernel", ["mlr1", "reference"])
def test_a_share_of_zero_is_the_cross_entropy_alone_bit_by_bit(loss_head, kernel):
    kernels, answers = HeadKernels(cross_entropy=kernel), []
    torch.manual_seed(1)
    first, hidden = Layer(), torch.randn(3, 1, 4)
    # A teacher that knows fewer ids than the student has rows.
    teacher = loss_head.Teacher(num_ids=6, weight=torch.randn(6, 5))
    lesson = Lesson(targets=HiddenTargets(hidden=torch.randn(3, 1, 5)), alpha=0.0)
    for words in ({}, {"context": lesson, "teacher": teacher}):
        layer, h = Layer(), hidden.clone().requires_grad_()
        layer.load_state_dict(first.state_dict())
        done = call(loss_head, layer, hidden=h, kernels=kernels, **words)
        done.total.backward()
        answers.append((done, h.grad, layer.weight.grad))
    (alone, *grads), (told, *same) = answers
    assert torch.equal(alone.total, told.total)
    assert torch.equal(alone.report["lm loss"], told.report["lm loss"])
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert told.report["kd loss"][0] > 0


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_the_divergences_definition_is_the_fused_one(loss_head, direction):
    torch.manual_seed(1)
    first, hidden = Layer(torch.float64), torch.randn(3, 1, 4).double()
    teacher = loss_head.Teacher(num_ids=6, weight=torch.randn(6, 5).double())
    lesson = Lesson(
        targets=HiddenTargets(
            hidden=torch.randint(-90, 90, (3, 1, 5), dtype=torch.int8),
            scale=torch.rand(3, 1) / 90,
        ),
        alpha=0.3,
        mask=torch.tensor([[1.0], [1.0], [0.0]]),
        objective=Objective(direction=direction, temperature=2.0, beta=0.2),
    )
    answers = []
    for divergence, gathers in (("mlr1", False), ("reference", False), ("reference", True)):
        layer, h = Layer(torch.float64), hidden.clone().requires_grad_()
        layer.load_state_dict(first.state_dict())
        if gathers:
            layer.weight.main_grad = torch.zeros_like(layer.weight)
        kernels = HeadKernels(divergence=divergence)
        done = call(loss_head, layer, hidden=h, kernels=kernels, teacher=teacher, context=lesson)
        done.total.backward()
        report = [done.report[name] for name in ("lm loss", "kd loss")]
        # Where the engine gathers gradients it takes none from autograd for this weight.
        grad = layer.weight.main_grad if gathers else layer.weight.grad
        answers.append((done.total.detach(), *report, h.grad, grad))
    for ours, *theirs in zip(*answers, strict=True):
        for their in theirs:
            torch.testing.assert_close(their, ours, rtol=1e-6, atol=1e-7)


def test_parameters_are_waited_for_before_they_are_read(loss_head):
    layer = Layer()
    stale = call(loss_head, layer).total

    def arrive(module, *_):
        module.weight.data.zero_()

    layer.register_forward_pre_hook(arrive)
    fresh = call(loss_head, layer).total
    assert stale != fresh
    torch.testing.assert_close(fresh, torch.tensor(8.0).log() * 2)


@pytest.mark.parametrize(("marks", "expected"), list(product([{}, {"zero_out_wgrad": True}], [1])))
def test_a_main_gradient_takes_the_gradient_in_fp32(loss_head, marks, expected):
    weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    weight.main_grad = torch.ones(2, 3)
    for name, value in marks.items():
        setattr(weight, name, value)
    grad = torch.full((2, 3), 1 + 2**-12)
    given = loss_head.add_to_main_grad(weight, grad, torch.tensor(2.0))
    assert (given is None) == bool(marks)
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.eq(1 + 2 * (1 + 2**-12)).all()
