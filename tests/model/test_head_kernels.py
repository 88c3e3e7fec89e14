"""What the head's implementations cannot do is refused before a run begins."""

from dataclasses import replace

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError, MachineError
from megatron_mlr1.model.head_kernels import HeadKernels, HeadRun
from megatron_mlr1.options import KERNELS, split_words

HAS_GPU = torch.cuda.is_available() and not cpu.is_active()
PLAIN = HeadRun(tensor_parallel=1, fp16=False, whole_step_graph=False, packed=False, distils=False)
KD = replace(PLAIN, distils=True)
SPLIT = replace(KD, tensor_parallel=2)
GRAPH = replace(PLAIN, whole_step_graph=True)


def kernels_of(*words):
    options, _ = split_words(words)
    return HeadKernels.of(options.kernels, options.logits)


def test_flags_become_the_heads_kernels():
    assert kernels_of() == HeadKernels()
    chosen = kernels_of(
        "--mlr1-kernels", "linear_cross_entropy=quack,linear_kl=reference", "--mlr1-logits", "bf16"
    )
    assert chosen == HeadKernels(cross_entropy="quack", divergence="reference", logits="bf16")
    assert (HeadKernels().logits_dtype, chosen.logits_dtype) == (None, torch.bfloat16)


def test_the_default_and_the_reference_work_in_every_layout():
    for run in (PLAIN, KD, SPLIT, replace(SPLIT, sparse=True), GRAPH, replace(PLAIN, packed=True)):
        HeadKernels().refuse(run)
    HeadKernels(cross_entropy="reference").refuse(SPLIT)
    HeadKernels(cross_entropy="reference").refuse(replace(PLAIN, fsdp=True))
    HeadKernels(divergence="reference").refuse(KD)
    HeadKernels(logits="bf16").refuse(PLAIN)
    HeadKernels(cross_entropy="reference", logits="bf16").refuse(KD)


@pytest.mark.parametrize(
    ("kernels", "run", "message"),
    [
        ({"cross_entropy": "liger"}, SPLIT, "linear_cross_entropy=liger knows no split"),
        ({"cross_entropy": "quack"}, SPLIT, "linear_cross_entropy=quack knows no split"),
        ({"divergence": "liger"}, SPLIT, "linear_kl=liger knows no split"),
        ({"divergence": "reference"}, SPLIT, "linear_kl=reference knows no split"),
        ({"divergence": "reference"}, replace(KD, sparse=True), "hidden states alone"),
        ({"logits": "bf16"}, replace(PLAIN, fp16=True), "fp16"),
        ({"logits": "bf16", "cross_entropy": "reference"}, PLAIN, "Leave one of the two"),
        ({}, replace(GRAPH, distils=True), "with --teacher"),
        ({}, replace(GRAPH, packed=True), "documents kept apart"),
        ({"cross_entropy": "liger"}, GRAPH, "counts tokens on the host"),
        ({}, replace(PLAIN, fsdp=True), "linear_cross_entropy=mlr1: it makes"),
        ({"cross_entropy": "reference"}, replace(KD, fsdp=True), "with --teacher: it makes"),
    ],
    ids=str,
)
def test_choices_that_cannot_work_are_refused(kernels, run, message):
    with pytest.raises(ConfigError, match=message):
        HeadKernels(**kernels).refuse(run)


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("op", "field"), [("linear_cross_entropy", "cross_entropy"), ("linear_kl", "divergence")]
)
def test_a_library_is_asked_for_only_where_it_is_used(op, field):
    for name in KERNELS[op]:
        if name in ("mlr1", "reference"):
            continue
        with pytest.raises(MachineError, match=name):
            HeadKernels(**{field: name}).refuse(KD)
    HeadKernels(divergence="liger").refuse(PLAIN)
