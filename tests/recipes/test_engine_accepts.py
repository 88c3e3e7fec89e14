"""The engine's own parser and checks take every recipe, and know none of our names."""

from argparse import ArgumentParser, Namespace
from itertools import product

import pytest

from megatron_mlr1.options import add_mlr1_arguments
from megatron_mlr1.recipes import expand
from megatron_mlr1.recipes.batch import scheduled_batches
from megatron_mlr1.recipes.plan import DATA_FLAGS, DISPLACES, IN_ITERATIONS, PARALLEL_FLAGS
from megatron_mlr1.recipes.sheet import names

pytestmark = pytest.mark.filterwarnings("ignore")
ON_A_CPU = (
    *("--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--no-rope-fusion", "--no-masked-softmax-fusion"),
)
"""What the engine room adds where there is no GPU; its checks ask for it."""


def flags_of(parser: ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False, exit_on_error=False))


@pytest.mark.parametrize(
    ("model", "stage"), [*product(names("models"), names("stages"))], ids=lambda value: value
)
def test_the_engine_takes_every_recipe(model: str, stage: str, parser: ArgumentParser) -> None:
    from megatron.training.arguments import validate_args

    for world_size in (1, 8) if model == "tiny" else (1, 8, 128):
        plan = expand(["--model", model, "--stage", stage, "--save", "checkpoints"], world_size)
        arguments = parser.parse_args([*plan.words, *ON_A_CPU])
        arguments.rank, arguments.world_size = 0, world_size
        validate_args(arguments)
        assert arguments.params_dtype.itemsize == (4 if model == "tiny" else 2)


def test_no_flag_and_no_name_of_ours_is_the_engines(parser: ArgumentParser) -> None:
    ours = add_mlr1_arguments(ArgumentParser(add_help=False))
    assert flags_of(ours) & flags_of(parser) == set()
    assert vars(ours.parse_args([])).keys() & engine_names(parser) == set()


def engine_names(parser: ArgumentParser) -> set[str]:
    return set(vars(parser.parse_args([], Namespace())))


def test_every_flag_that_we_know_by_name_is_the_engines(parser: ArgumentParser) -> None:
    known = {*DATA_FLAGS, *PARALLEL_FLAGS, *DISPLACES, *IN_ITERATIONS}
    known |= {name.replace("iters", "samples") for name in IN_ITERATIONS}
    known |= {rival for rivals in DISPLACES.values() for rival in rivals}
    assert {f"--{name}" for name in known} - flags_of(parser) == set()


@pytest.mark.parametrize("schedule", ["0:768 250B:1536,500b:3K", " 0:8  1.5K:16 ", "2M:2.5k 0:1"])
def test_the_batches_of_a_schedule_are_those_that_the_engine_reads(schedule: str) -> None:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    read = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(schedule, 64)
    assert sorted(scheduled_batches(schedule)) == sorted(batch for _, batch in read)
