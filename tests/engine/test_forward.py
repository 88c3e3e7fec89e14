"""Whether a run's head may gather its gradient before the backward, and how a loss is judged."""

from argparse import Namespace

import pytest
import torch

from megatron_mlr1 import cpu

PLAIN = {
    "fp16": False,
    "reuse_grad_buf_for_mxfp8_param_ag": False,
    "use_layer_wise_distributed_optimizer": False,
}


@pytest.fixture(scope="module")
def foresees():
    cpu.activate()
    from megatron_mlr1.engine.forward import foresees_backward

    return lambda **changes: foresees_backward(Namespace(**PLAIN | changes))


def test_the_gradient_joins_the_main_gradient_at_once_in_a_plain_run(foresees):
    assert foresees()


@pytest.mark.parametrize("name", PLAIN)
def test_it_waits_for_the_backward_where_the_memory_or_the_factor_is_not_the_heads_own(
    foresees, name
):
    assert not foresees(**{name: True})


def test_the_flags_are_the_engines(foresees):
    from megatron_mlr1.engine import command_line

    known = vars(command_line.parser().parse_known_args([])[0])
    # The last follows from --optimizer when the engine validates its arguments.
    assert set(PLAIN) - {"use_layer_wise_distributed_optimizer"} <= set(known)


def test_a_rerun_is_compared_with_the_loss_as_it_was_before_the_schedule_divided_it(monkeypatch):
    cpu.activate()
    from megatron.core import rerun_state_machine
    from megatron.core.rerun_state_machine import RerunMode, RerunState, RerunStateMachine

    from megatron_mlr1.engine.forward import ForwardStep
    from megatron_mlr1.losses.language_model import MicroBatchLoss
    from megatron_mlr1.model.head_kernels import HeadKernels

    machine = RerunStateMachine(mode=RerunMode.REPORT_DETERMINISM_STATS)
    machine.state = RerunState.INITIAL_RUN
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    args = Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    total = torch.tensor(6.0, requires_grad=True) * 1
    done = MicroBatchLoss(total=total, tokens=torch.tensor(2), report={})
    loss, tokens, _ = ForwardStep(args, HeadKernels())._loss(done)
    loss /= tokens
    assert loss.requires_grad
    assert [float(kept) for kept in machine.saved_results.values()] == [6.0] * 3
