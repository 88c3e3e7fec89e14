"""The engine's faults stay mended, and are still there to be mended."""

import queue

import pytest
import torch

from megatron_mlr1 import cpu

cpu.activate()

import megatron.core.datasets.utils  # noqa: E402
import megatron.training.training  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    FileSystemWriterAsync,
)
from megatron.core.rerun_state_machine import RerunMode  # noqa: E402

from megatron_mlr1.engine import mends  # noqa: E402


def adam_after_a_load(*, separate: bool) -> torch.Tensor:
    """One parameter of two after three steps, a load as the engine does it, and three more."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    adam = torch.optim.AdamW(parameters, lr=0.1)
    gradients = torch.randn(6, 3)

    def steps(those: torch.Tensor) -> None:
        for gradient in those:
            for parameter in parameters:
                parameter.grad = gradient.clone()
            adam.step()

    steps(gradients[:3])
    if separate:
        adam.register_load_state_dict_post_hook(mends.separate_steps)
    state = adam.state_dict()
    shared = torch.tensor(3.0)
    for entry in state["state"].values():
        entry["step"] = shared
    adam.load_state_dict(state)
    steps(gradients[3:])
    return parameters[0].detach()


def test_separate_steps_make_a_load_exact():
    torch.manual_seed(0)
    lone = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([lone], lr=0.1)
    for gradient in torch.randn(6, 3):
        lone.grad = gradient.clone()
        adam.step()
    assert torch.equal(adam_after_a_load(separate=True), lone.detach())
    assert not torch.equal(adam_after_a_load(separate=False), lone.detach()), "torch mended it"


def test_initial_state_changes_no_step():
    results = []
    for initialise in (False, True):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        adam = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
        if initialise:
            mends.initialise_state(adam)
        parameter.grad = torch.tensor([0.3, 0.5])
        adam.step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


def loads_from_another(*, fitted: bool) -> torch.optim.Optimizer:
    """An optimizer that wants more of its groups than the one whose state it takes has."""
    parameter = torch.nn.Parameter(torch.ones(3))
    saved = torch.optim.Adam([parameter], lr=0.1).state_dict()
    saved["param_groups"][0]["step"] = 5.0
    other = torch.optim.NAdam([parameter], lr=0.2, momentum_decay=0.25)
    if fitted:
        other.register_load_state_dict_post_hook(mends.fit_groups)
    other.load_state_dict(saved)
    parameter.grad = torch.ones(3)
    other.step()
    return other


def test_an_optimizer_goes_on_from_groups_of_another_kind():
    (group,) = loads_from_another(fitted=True).param_groups
    assert (group["lr"], group["momentum_decay"], group["step"]) == (0.1, 0.25, 5)
    assert isinstance(group["step"], int)
    with pytest.raises(KeyError, match="momentum_decay"):
        loads_from_another(fitted=False)


def test_mending_twice_is_mending_once():
    mends.apply()
    once = megatron.training.training.get_megatron_optimizer
    mends.apply()
    assert megatron.training.training.get_megatron_optimizer is once


def test_the_engine_does_not_compile_what_it_brings():
    mends.apply()
    assert megatron.core.datasets.utils.compile_helpers() is None


def test_every_rerun_mode_of_the_flag_is_one():
    mends.apply()
    assert RerunMode("report_stats") is RerunMode.REPORT_DETERMINISM_STATS
    with pytest.raises(ValueError, match="report_nothing"):
        RerunMode("report_nothing")


def test_a_checkpoint_writer_says_what_the_disk_said(tmp_path):
    mends.apply()
    folder = tmp_path / "that is not there"
    bucket = (folder / "__0_0.distcp", "__0_0.distcp", ([], []))
    answers: queue.Queue[object] = queue.Queue()
    FileSystemWriterAsync.write_preloaded_data_multithread([], False, 0, [bucket], answers)
    assert "No such file or directory" in str(answers.get_nowait())


@pytest.mark.gpu
def test_no_torch_optimizer_is_mended_where_transformer_engine_is():
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    if HAVE_APEX_OR_TE:
        mends.apply()
        make = megatron.training.training.get_megatron_optimizer
        assert not hasattr(make, "makes_resumable")
