"""A micro-batch's way to CUDA's device and through the model, without a GPU."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_mlr1 import cpu

cpu.activate()

from megatron.training import training  # noqa: E402

from megatron_mlr1.engine.forward import ForwardStep  # noqa: E402
from megatron_mlr1.engine.groups import place  # noqa: E402
from megatron_mlr1.engine.lessons import Lessons, head_shard  # noqa: E402
from megatron_mlr1.model.head_kernels import HeadKernels  # noqa: E402
from megatron_mlr1.model.one_process import one_process  # noqa: E402
from megatron_mlr1.ops.linear_kl import Objective  # noqa: E402
from megatron_mlr1.teacher.in_process import NullTeacher  # noqa: E402
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec  # noqa: E402
from tests.support.fake_cuda import backward, fake_cuda  # noqa: E402
from tests.support.fake_cuda_model import model_on_device  # noqa: E402

BATCH, LENGTH = 2, 16
WIDTH, IDS = 24, 300
FORMS = {
    "hidden": TargetSpec(),
    "hidden_int8": TargetSpec(form="hidden_int8"),
    "top_k": TargetSpec(form="top_k", k=4),
    "hybrid": TargetSpec(form="hybrid", k=4, m=3),
}


@pytest.fixture(scope="module")
def groups():
    with one_process() as groups:
        yield groups


@pytest.fixture
def witness(monkeypatch):
    # The engine counts the documents of a step on the device, and keeps the sum.
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", None)
    monkeypatch.setattr(training, "_seqlen_stats_active", False)
    with fake_cuda() as witness:
        yield witness


def step(*, packed):
    args = Namespace(
        dataloader_inter_document_masking=packed,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        micro_batch_size=BATCH,
        seq_length=LENGTH,
        padded_vocab_size=128,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
    )
    return ForwardStep(args, HeadKernels())


def read(*, packed):
    """What a loader gives, on the host."""
    rows = {
        name: torch.zeros(BATCH, LENGTH, dtype=dtype)
        for name, dtype in (
            ("tokens", torch.int64),
            ("labels", torch.int64),
            ("loss_mask", torch.float32),
            ("position_ids", torch.int64),
        )
    }
    if not packed:
        return rows
    bounds = torch.full((BATCH, LENGTH + 1), LENGTH, dtype=torch.int32)
    bounds[0, :2] = torch.tensor([0, 5])
    bounds[1, :3] = torch.tensor([0, 3, 9])
    return rows | {"cu_seqlens": bounds, "max_seqlen": torch.tensor([11, 7], dtype=torch.int32)}


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "documents"])
def test_a_micro_batch_comes_to_the_device_and_through_the_model_without_a_wait(
    groups, witness, packed
):
    model = model_on_device(groups)
    output, hand_on = step(packed=packed)(iter([read(packed=packed)]), model)
    total, tokens, _ = hand_on(output)
    backward(total / tokens)
    assert all(parameter.grad.is_cuda for parameter in model.parameters())
    assert witness.waits == []


def test_documents_are_counted_on_the_host(groups, witness):
    given = read(packed=True)
    batch, packed = step(packed=True)._batch(given, place(), evaluates=False)
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 11
    # 0, 5, 16, 19, 25, 32
    assert packed.cu_seqlens_q.shape == (6,)
    assert (packed.cu_seqlens_q.dtype, packed.cu_seqlens_q.is_cuda) == (torch.int32, True)
    assert batch["tokens"].shape == batch["loss_mask"].shape == (1, BATCH * LENGTH)
    assert witness.waits == []
    # A micro-batch that the engine replays is read again as it was.
    assert given["tokens"].shape == (BATCH, LENGTH)
    assert given["cu_seqlens"].shape == (BATCH, LENGTH + 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_teachers_targets_come_to_the_device_without_a_wait(groups, witness, form):
    teacher, spec = NullTeacher(IDS, WIDTH), FORMS[form]
    request = TargetRequest(
        tokens=np.zeros(LENGTH, np.int32), bounds=np.array([0, LENGTH], np.int32), spec=spec
    )
    targets = [teacher.fetch(teacher.submit(request, 0), 1.0) for _ in range(BATCH)]
    lessons = Lessons(
        identity=teacher.identity,
        spec=spec,
        objective=Objective(),
        here=place(),
        sequence_parallel=False,
    )
    rows = torch.arange(BATCH * LENGTH, device="cuda").view(BATCH, LENGTH)
    found = lessons.make(targets, rows, 0.5).targets
    if spec.is_sparse:
        kinds = {"ids": torch.int64, "weights": torch.float32}
        shape = (BATCH * LENGTH, spec.k + spec.m)
    else:
        kinds = {"hidden": torch.int8 if form == "hidden_int8" else torch.bfloat16}
        shape = (LENGTH, BATCH, WIDTH)
    for name, dtype in kinds.items():
        tensor = getattr(found, name)
        assert (tensor.dtype, tensor.shape, tensor.is_cuda) == (dtype, shape, True)
    assert witness.waits == []


@pytest.mark.parametrize("form", ["hidden", "hidden_int8"])
def test_a_teachers_head_lies_on_the_device(groups, witness, form):
    teacher = NullTeacher(IDS, WIDTH)
    head = head_shard(
        teacher, teacher.identity, FORMS[form], place(), 120, 128, torch.device("cuda", 0)
    )
    assert (head.dtype, head.shape, head.is_cuda) == (torch.bfloat16, (120, WIDTH), True)
