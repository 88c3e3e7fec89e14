"""The loss head in the engine's model and schedules, against the engine's own head and loss."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError
from tests.support.world import run_in_world

LAYOUTS = {
    "data, tied": {},
    "data, overlapped, distributed optimizer": {
        "tied": False,
        "ddp": {"overlap_grad_reduce": True, "use_distributed_optimizer": True},
    },
    "data, overlapped, tied": {"ddp": {"overlap_grad_reduce": True}},
    "tensor": {"tensor": 2, "tied": False},
    "tensor, tied": {"tensor": 2},
    "tensor and sequence, tied": {"tensor": 2, "sequence": True},
    "tensor and sequence, per-token loss": {
        "tensor": 2,
        "sequence": True,
        "tied": False,
        "config": {"calculate_per_token_loss": True},
    },
    "pipeline, tied": {"pipeline": 2, "ddp": {"overlap_grad_reduce": True}},
    "pipeline": {"pipeline": 2, "tied": False},
}
LIMIT = 1e-6
LENGTH, BATCH, MICRO_BATCHES, VOCABULARY = 16, 2, 2, 64


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run_in_world(2, measure, tmp_path_factory.mktemp("world"))


def measure():
    answer = {name: compare(name) for name in LAYOUTS}
    answer["bf16"] = compare("data, overlapped, tied", torch.bfloat16)
    answer["teacher"] = with_teacher()
    return answer


def compare(name, dtype=torch.float32):
    """Differences between the engine's loss and ours: of the log, and of every main gradient."""
    with engine(
        **{k: v for k, v in LAYOUTS[name].items() if k in ("tensor", "pipeline")}
    ) as groups:
        model = build_model(groups, dtype, **LAYOUTS[name])
        theirs, ours = (train_step(model, kernel) for kernel in ("reference", "mlr1"))
        evaluated = [train_step(model, k, evaluate=True) for k in ("reference", "mlr1")]
    assert theirs.keys() == ours.keys()
    assert len(theirs) > 3
    errors = {key: relative(ours[key], theirs[key]) for key in theirs}
    errors |= {f"evaluated {k}": relative(evaluated[1][k], v) for k, v in evaluated[0].items()}
    return errors


def relative(a, b):
    assert b.any(), "nothing to compare"
    return float((a.double() - b.double()).norm() / b.double().norm())


class engine:  # noqa: N801
    """The engine's groups and random states in a layout."""

    def __init__(self, tensor=1, pipeline=1):
        self.layout = tensor, pipeline

    def __enter__(self):
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(*self.layout)
        torch.manual_seed(0)
        model_parallel_cuda_manual_seed(0)
        return ProcessGroupCollection.use_mpu_process_groups()

    def __exit__(self, *_):
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def build_model(
    groups, dtype, *, tied=True, tensor=1, pipeline=1, sequence=False, ddp=None, config=None
):
    """This process's stage, in the engine's wrappers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    from megatron_mlr1.model.build import transformer_config
    from megatron_mlr1.model.shape import ModelShape
    from megatron_mlr1.model.spec import block_spec

    shape = ModelShape(
        num_layers=2,
        hidden_size=24,
        ffn_hidden_size=40,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=VOCABULARY,
    )
    settings = transformer_config(shape, norm_epsilon=1e-5)
    settings.tensor_model_parallel_size = tensor
    settings.pipeline_model_parallel_size = pipeline
    settings.sequence_parallel = sequence
    settings.params_dtype = settings.pipeline_dtype = dtype
    settings.bf16 = dtype == torch.bfloat16
    settings.finalize_model_grads_func = finalize_model_grads
    # As the engine sets it: its own backward, which CPU mode reaches too.
    settings.deallocate_pipeline_outputs = True
    for name, value in (config or {}).items():
        setattr(settings, name, value)
    rank = groups.pp.rank()
    model = GPTModel(
        config=settings,
        transformer_layer_spec=block_spec(settings, swiglu_kernel="reference"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=rank == 0,
        post_process=rank == pipeline - 1,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        pg_collection=groups,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    if settings.bf16:
        model = Float16Module(settings, model)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {}))
    return DistributedDataParallel(settings, ddp_config, model)


def train_step(model, kernel, *, evaluate=False):
    """Losses and main gradients of two micro-batches through the engine's schedule."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_mlr1.model.loss_head import LossHead

    head = LossHead(model.config, vocab_size=VOCABULARY, kernel=kernel)
    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=lambda data, model: forward_step(data, model, head),
        data_iterator=batches(parallel_state.get_data_parallel_rank()),
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=evaluate,
    )
    answer = {}
    if reports:
        answer["log"] = torch.stack([report["lm loss"] for report in reports])
    if not evaluate:
        answer |= {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return answer


def forward_step(data, model, head):
    tokens, labels, mask = next(data)
    positions = torch.arange(LENGTH).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels, loss_mask=mask, output_processor=head)
    return output, lambda loss: (loss.total, loss.tokens, loss.report)


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        mask = torch.randint(0, 2, (BATCH, LENGTH), generator=generator).float()
        yield tokens[:, :-1], tokens[:, 1:], mask


def with_teacher():
    """Errors of a distilled micro-batch with tensor and sequence parallelism, by definition."""
    from megatron_mlr1.losses.distillation import HiddenTargets, Lesson
    from megatron_mlr1.model.loss_head import LossHead
    from megatron_mlr1.ops.linear_kl import Objective
    from tests.support.softmax_losses import divergence

    with engine(tensor=2) as groups:
        model = build_model(groups, torch.float32, tensor=2, sequence=True)
        tokens, labels, mask = next(batches(0))
        positions = torch.arange(LENGTH).expand_as(tokens)
        generator = torch.Generator().manual_seed(9)
        states = torch.randn(LENGTH, BATCH, 20, generator=generator)
        teacher_weight = torch.randn(VOCABULARY, 20, generator=generator) / 3
        rank = groups.tp.rank()
        half, rows = slice(8 * rank, 8 * rank + 8), slice(32 * rank, 32 * rank + 32)
        head = LossHead(
            model.config,
            vocab_size=VOCABULARY,
            kernel="mlr1",
            teacher_weight=teacher_weight[rows],
        )
        lesson = Lesson(
            targets=HiddenTargets(hidden=states[half]),
            alpha=0.3,
            objective=Objective(temperature=2.0),
        )
        done = model(
            tokens,
            positions,
            None,
            labels=labels,
            loss_mask=mask,
            output_processor=head,
            output_processor_context=lesson,
        )
        with torch.no_grad():
            logits = model(tokens, positions, None, runtime_gather_output=True)
    ce = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    t = (states @ teacher_weight.T).transpose(0, 1)
    kd = divergence(logits.flatten(0, 1), t.flatten(0, 1), temperature=2.0).view_as(ce)
    expected = (mask * (0.7 * ce + 0.3 * 4 * kd)).sum()
    return {
        "total": relative(done.total.detach()[None], expected[None]),
        "kd loss": relative(done.report["kd loss"][:1], (mask * kd).sum()[None]),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_the_engines(answers, layout):
    for errors in (answer[layout] for answer in answers):
        assert max(errors.values()) < LIMIT, errors


def test_in_bf16_they_differ_by_the_engines_rounding_alone(answers):
    for answer in answers:
        errors = answer["bf16"]
        assert max(v for k, v in errors.items() if "log" in k) < 1e-3
        assert max(errors.values()) < 0.03, errors


def test_a_teachers_hidden_states_join_at_the_same_place(answers):
    for answer in answers:
        assert max(answer["teacher"].values()) < LIMIT


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
    with pytest.raises(ConfigError, match=f"--{flag}"):
        loss_head.LossHead(config, vocab_size=8, kernel="mlr1")
    loss_head.LossHead(config, vocab_size=8, kernel="reference")


def call(loss_head, layer, **words):
    head = loss_head.LossHead(SimpleNamespace(**CONFIG), vocab_size=8, kernel="mlr1")
    return head(
        hidden_states=torch.randn(3, 1, 4),
        output_layer=layer,
        output_weight=None,
        labels=torch.tensor([[0, 1, 2]]),
        loss_mask=torch.ones(1, 3),
        context=None,
        compute_language_model_loss=None,
        **words,
    )


def test_parameters_are_waited_for_before_they_are_read(loss_head):
    layer = torch.nn.Linear(4, 8, bias=False)
    layer.tp_group, layer.sequence_parallel = None, False
    stale = call(loss_head, layer, position_ids=None).total

    def arrive(module, *_):
        module.weight.data.zero_()

    layer.register_forward_pre_hook(arrive)
    fresh = call(loss_head, layer).total
    assert stale != fresh
    torch.testing.assert_close(fresh, torch.tensor(3 * 8.0).div(3).log() * 3)


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
