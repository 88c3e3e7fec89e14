"""The loss head in the engine's model and schedules, against the engine's own head and loss."""

import pytest
import torch

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
LIMIT = 2e-6
"""Of fp32: gradients of three micro-batches cancel a little, and leave their rounding."""
SCALE = 8.0
"""Loss scale: a power of two, so that it rounds nothing."""
LENGTH, BATCH, MICRO_BATCHES, VOCABULARY = 16, 2, 3, 64
NOTHING_COUNTS = 1
"""A micro-batch whose tokens are all masked."""


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
        theirs = train_step(model, "reference")
        ours = {kernel: train_step(model, kernel) for kernel in ("mlr1", "foreseen")}
        evaluated = [train_step(model, k, evaluate=True) for k in ("reference", "foreseen")]
    assert len(theirs) > 3
    errors = {f"evaluated {k}": relative(evaluated[1][k], v) for k, v in evaluated[0].items()}
    for kernel, answer in ours.items():
        assert answer.keys() == theirs.keys()
        errors |= {f"{kernel} {key}": relative(answer[key], theirs[key]) for key in theirs}
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
    """Losses and main gradients of a step's micro-batches through the engine's schedule."""
    from megatron_mlr1.model.head_kernels import HeadKernels
    from megatron_mlr1.model.loss_head import LossHead

    # As training ties them.
    model.config.grad_scale_func = lambda loss: SCALE * loss
    foresees = {} if kernel != "foreseen" else {"num_micro_batches": lambda: MICRO_BATCHES}
    kernels = HeadKernels(cross_entropy="reference" if kernel == "reference" else "mlr1")
    head = LossHead(model.config, vocab_size=VOCABULARY, kernels=kernels, **foresees)
    model.zero_grad_buffer()
    with torch.set_grad_enabled(not evaluate):
        reports = run_schedule(model, head, evaluate)
    answer = {}
    if reports:
        answer["log"] = torch.stack([report["lm loss"] for report in reports])
    if evaluate:
        assert not any(p.main_grad.any() for p in model.parameters())
        return answer
    return answer | {name: p.main_grad.clone() for name, p in model.named_parameters()}


def run_schedule(model, head, evaluate):
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()(
        forward_step_func=lambda data, model: forward_step(data, model, head),
        data_iterator=batches(parallel_state.get_data_parallel_rank()),
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=evaluate,
    )


def forward_step(data, model, head):
    tokens, labels, mask = next(data)
    positions = torch.arange(LENGTH).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels, loss_mask=mask, output_processor=head)
    return output, lambda loss: (loss.total, loss.tokens, loss.report)


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    for micro_batch in range(MICRO_BATCHES):
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        mask = torch.randint(0, 2, (BATCH, LENGTH), generator=generator).float()
        yield tokens[:, :-1], tokens[:, 1:], mask * (micro_batch != NOTHING_COUNTS)


def with_teacher():
    """Errors of a distilled micro-batch with tensor and sequence parallelism, by definition."""
    from megatron_mlr1.losses.distillation import HiddenTargets, Lesson
    from megatron_mlr1.model.head_kernels import HeadKernels
    from megatron_mlr1.model.loss_head import LossHead, Teacher
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
            kernels=HeadKernels(),
            teacher=Teacher(num_ids=VOCABULARY, weight=teacher_weight[rows]),
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
