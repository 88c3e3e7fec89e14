"""A flag that the chosen dataset does not know is refused, and not passed over."""

import pytest

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes import expand

STAGE = ["--model", "tiny", "--stage", "pretrain_phase1", "--data-root", "corpora"]


def plan(*words: str):
    return expand([*STAGE, *words], world_size=1)


@pytest.mark.parametrize("word", ["--reset-position-ids", "--dataloader-type=cyclic"])
def test_flags_of_megatrons_datasets_are_refused_by_ours(word):
    name = word.split("=")[0]
    with pytest.raises(ConfigError, match=f"{name} .the command line. belongs to Megatron's"):
        plan(word)
    assert plan(word, "--mlr1-dataset", "megatron").dataset == "megatron"


@pytest.mark.parametrize(
    "words", [("--mlr1-loader", "dali"), ("--mixture-switch", "9=sft_general")]
)
def test_our_flags_are_refused_by_megatrons_datasets(words):
    with pytest.raises(ConfigError, match=f"{words[0]} belongs to --mlr1-dataset mlr1"):
        plan(*words, "--mlr1-dataset", "megatron")


def test_mock_data_are_the_engines_whatever_the_dataset():
    assert plan("--mock-data").dataset == "megatron"
    assert plan("--mock-data", "--reset-position-ids").dataset == "megatron"
    assert plan().dataset == "mlr1"


def test_a_switch_names_the_mixtures_that_follow():
    switches = plan("--mixture-switch", "100=pretrain_phase2,900=midtrain_phase1").switches
    assert [(sample, mixture.name) for sample, mixture in switches] == [
        (100, "pretrain_phase2"),
        (900, "midtrain_phase1"),
    ]


def test_a_switch_of_data_by_path_is_refused():
    with pytest.raises(ConfigError, match="--mixture-switch changes the mixture"):
        plan("--mixture-switch", "100=pretrain_phase2", "--data-path", "corpora/wiki")
