"""Libraries for the head: refused where they cannot run, and right where they can."""

import inspect
import sys

import pytest
import torch

from megatron_mlr1 import cpu
from megatron_mlr1.errors import MachineError
from megatron_mlr1.ops import libraries
from megatron_mlr1.ops.libraries import LEFT_OUT, PACKAGES, require
from tests.support.softmax_losses import divergence

HAS_GPU = torch.cuda.is_available() and not cpu.is_active()
CROSS_ENTROPIES = {
    "liger": libraries.liger_cross_entropy,
    "quack": libraries.quack_cross_entropy,
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make this process see one package alone, in a version."""

    def install(package, version):
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return install


@pytest.mark.parametrize("library", PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_brings_it(library, installed):
    package, least = PACKAGES[library]
    command = rf"pip install 'megatron_mlr1\[\w+\]' '{package}>={least}'"
    with pytest.raises(MachineError, match=command):
        require(library)


@pytest.mark.parametrize(
    ("library", "version"), [("liger", "0.8.4"), ("quack", "0.5.10"), ("te", "2.17.0+abc")]
)
def test_versions_that_have_other_calls_or_wrong_gradients_are_refused(library, version, installed):
    package, least = PACKAGES[library]
    installed(package, version)
    with pytest.raises(MachineError, match=f"{least} or later; {version[:6]}"):
        require(library)


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
@pytest.mark.parametrize("library", PACKAGES)
def test_a_machine_without_a_cuda_device_is_refused(library, installed):
    installed(*PACKAGES[library])
    with pytest.raises(MachineError, match="no CUDA device"):
        require(library)


def case(device, *, tokens=37, ids=1152, width=192):
    """Sizes for which quack takes the kernels that it takes for 128,256 ids, and tunes nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, width, generator=generator).to(device, torch.bfloat16)
        for rows in (tokens, ids)
    )
    labels = torch.randint(0, ids, (tokens,), generator=generator).to(device)
    labels[::5] = LEFT_OUT
    return hidden.requires_grad_(), weight.div_(width**0.5).requires_grad_(), labels


def gradients(total, *tensors):
    return total.detach(), *torch.autograd.grad(total, tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("library", CROSS_ENTROPIES)
def test_a_librarys_cross_entropy_is_the_sum_over_tokens_that_count(library):
    pytest.importorskip(f"{library}_kernel" if library == "liger" else library)
    hidden, weight, labels = case("cuda")
    ours = gradients(3 * CROSS_ENTROPIES[library](hidden, weight, labels), hidden, weight)
    logits = hidden.double() @ weight.double().T
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    for got, want in zip(ours, gradients(3 * exact, hidden, weight), strict=True):
        assert (got.double() - want.double()).norm() < 0.01 * want.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_ligers_divergence_is_the_sum_over_tokens_that_count(direction):
    pytest.importorskip("liger_kernel")
    hidden, weight, labels = case("cuda")
    states, head, _ = (tensor.detach() for tensor in case("cuda", width=96))
    words = {"direction": direction, "temperature": 2.0, "beta": 0.2}
    ours = libraries.liger_divergence((hidden, weight), (states, head), labels, **words)
    z, t = hidden.double() @ weight.double().T, states.double() @ head.double().T
    exact = divergence(z, t, direction, 2.0, 0.2)[labels != LEFT_OUT].sum()
    pairs = gradients(ours, hidden, weight), gradients(exact, hidden, weight)
    for got, want in zip(*pairs, strict=True):
        assert (got.double() - want.double()).norm() < 0.02 * want.double().norm()


def test_calls_fit_the_signatures_of_the_libraries_that_are_here():
    ligers = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    forward = inspect.signature(ligers.LigerFusedLinearCrossEntropyFunction.forward)
    words = libraries.liger_cross_entropy_words(*(torch.zeros(1),) * 3)
    named = forward.bind(None, *words).arguments
    assert named["ignore_index"] == LEFT_OUT
    assert (named["reduction"], named["accum_dtype"]) == ("sum", torch.float32)
    assert named["return_z_loss"] is False
