"""The global batch stays; the micro batch gives way."""

import re

import pytest

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes.batch import Layout, largest_micro_batch, refuse_misfit


@pytest.mark.parametrize(
    ("global_batch", "bound", "world", "parallel", "micro"),
    [
        (2048, 16, 128, 1, 16),
        (2048, 16, 1, 1, 16),
        (2048, 16, 256, 1, 8),
        (2048, 16, 2048, 1, 1),
        (2048, 16, 48, 3, 16),
        (512, 4, 128, 2, 4),
        (12, 16, 2, 1, 6),
        (30, 4, 2, 1, 3),
        (14, 6, 1, 1, 2),
    ],
)
def test_the_largest_micro_batch_that_keeps_the_global_batch_is_taken(
    global_batch: int, bound: int, world: int, parallel: int, micro: int
) -> None:
    layout = Layout(world_size=world, model_parallel=parallel)
    assert largest_micro_batch(global_batch, bound, layout) == micro
    assert global_batch % (micro * layout.data_parallel) == 0


@pytest.mark.parametrize(
    ("world", "parallel", "near"),
    [(100, 1, "64 or 128"), (96, 2, "64 or 128"), (9, 3, "6 or 12"), (4096, 1, "2048")],
)
def test_a_number_of_processes_that_cannot_keep_it_is_refused_with_the_nearest_that_can(
    world: int, parallel: int, near: str
) -> None:
    with pytest.raises(ConfigError, match=f"Start {near} processes"):
        largest_micro_batch(2048, 16, Layout(world_size=world, model_parallel=parallel))


@pytest.mark.parametrize(("world", "parallel", "near"), [(10, 4, "8 or 12"), (2, 4, "4")])
def test_processes_that_do_not_make_whole_copies_are_refused(
    world: int, parallel: int, near: str
) -> None:
    with pytest.raises(ConfigError, match=f"Start {near} processes"):
        Layout(world_size=world, model_parallel=parallel)


@pytest.mark.parametrize(("world", "parallel"), [(0, 1), (1, 0), (1, -2)])
def test_no_process_and_no_copy_are_refused(world: int, parallel: int) -> None:
    with pytest.raises(ConfigError, match="both must be at least 1"):
        Layout(world_size=world, model_parallel=parallel)


@pytest.mark.parametrize(("global_batch", "bound"), [(0, 1), (8, 0)])
def test_an_empty_batch_is_refused(global_batch: int, bound: int) -> None:
    with pytest.raises(ConfigError, match="both must be at least 1"):
        largest_micro_batch(global_batch, bound, Layout(world_size=1, model_parallel=1))


def test_a_micro_batch_that_somebody_asked_for_is_never_changed_but_refused() -> None:
    layout = Layout(world_size=2, model_parallel=1)
    refuse_misfit(12, 3, layout)
    for asked, best in ((4, 3), (0, 1), (7, 6)):
        message = re.escape(f"--micro-batch-size {asked} on 2 copies")
        with pytest.raises(ConfigError, match=f"{message}.*Give {best}"):
            refuse_misfit(12, asked, layout)
