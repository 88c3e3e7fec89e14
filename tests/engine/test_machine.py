"""What a run finds set in its environment."""

import pytest

from megatron_mlr1 import cpu

cpu.activate()

from megatron_mlr1.engine import machine  # noqa: E402

PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.fixture
def after(monkeypatch):
    """The environment of a run of these words, with these variables set before."""

    def run(*words, **before):
        environment = dict(before)
        monkeypatch.setattr("os.environ", environment)
        machine.environment(words)
        return environment

    return run


def test_a_run_may_read_the_scales_of_its_own_checkpoints_in_fp8(after):
    assert after()[PICKLES] == "1"


def test_kernels_are_ordered_by_one_connection_but_under_fsdp(after):
    assert after()[CONNECTIONS] == "1"
    assert CONNECTIONS not in after("--use-megatron-fsdp")


def test_what_is_set_already_stays(after):
    before = {PICKLES: "0", CONNECTIONS: "8", "RANK": "3"}
    assert after(**before) == before


def test_a_process_without_a_launcher_gets_a_place_to_meet(after):
    alone = after()
    assert alone["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(alone["MASTER_PORT"]) < 2**16
    assert "MASTER_PORT" not in after(RANK="0")
