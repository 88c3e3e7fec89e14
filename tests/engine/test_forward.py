"""Whether a run's head may gather its gradient before the backward."""

from argparse import Namespace

import pytest

from megatron_mlr1 import cpu

PLAIN = {
    "fp16": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
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
