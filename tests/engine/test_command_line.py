"""What the engine's parser would answer with a stack trace is answered with a sentence."""

import pytest

from megatron_mlr1 import cpu

cpu.activate()

from megatron_mlr1.engine import machine  # noqa: E402
from megatron_mlr1.engine.command_line import parser, refuse_misread, refuse_unknown  # noqa: E402
from megatron_mlr1.errors import ConfigError  # noqa: E402
from megatron_mlr1.recipes.data_flags import MEGATRONS  # noqa: E402


@pytest.fixture(scope="module")
def known():
    return parser()


def test_an_unknown_flag_is_named_with_the_nearest_known(known):
    with pytest.raises(
        ConfigError, match=r"'--micro-batch-sise'. Did you mean --micro-batch-size\?"
    ):
        refuse_unknown(["--lr", "1e-3", "--micro-batch-sise=4"], known)


def test_a_value_that_its_flag_does_not_take_is_refused_without_a_list_of_all_flags(known, capsys):
    with pytest.raises(ConfigError, match="--lr: invalid float value: 'fast'"):
        refuse_misread(["--lr", "fast"], known)
    with pytest.raises(ConfigError, match="--ckpt-format: invalid choice: 'zarr'"):
        refuse_misread(["--ckpt-format", "zarr"], known)
    with pytest.raises(ConfigError, match="stray: no flag before it takes that word"):
        refuse_misread(["--lr", "1e-3", "stray"], known)
    assert capsys.readouterr() == ("", "")


def test_flags_of_the_engine_and_ours_are_known(known):
    refuse_unknown(["--lr=-1", "--tensor-model-parallel-size", "2", "--mixture", "x"], known)


def test_help_shows_our_group_before_the_engines(known):
    text = known.format_help()
    assert "--model NAME --stage NAME" in text[:200]
    assert text.index("MobileLLM-R1:") < text.index("network size:")


def test_the_machines_flags_are_the_engines(known):
    refuse_unknown(machine.words(()), known)
    refuse_unknown(machine.WITHOUT_TRANSFORMER_ENGINE, known)


def test_the_flags_of_megatrons_datasets_are_the_engines(known):
    refuse_unknown([f"--{name}" for name in MEGATRONS], known)


def test_fp8_without_a_device_for_it_is_refused():
    with pytest.raises(ConfigError, match="--fp8-format needs"):
        machine.words(("--fp8-format", "hybrid"))


def test_the_users_peak_is_taken_and_none_is_made_up():
    assert machine.peak_tflops(123.0) == 123.0
    assert machine.peak_tflops(None) is None
