"""The rows of the step and the limits of convergence, without the runs behind them."""

from argparse import Namespace
from math import nan

import pytest

from benchmarks import bench_convergence, bench_step
from benchmarks.bench_convergence import Limit, distance
from benchmarks.bench_step import Run
from benchmarks.frame.precisions import PRECISIONS
from benchmarks.frame.table import Table
from benchmarks.frame.training import Outcome
from megatron_mlr1 import cpu
from megatron_mlr1.options import KERNELS
from megatron_mlr1.recipes import expand

cpu.activate()

from megatron_mlr1.engine import fp8  # noqa: E402
from megatron_mlr1.engine.command_line import parser, refuse_unknown  # noqa: E402

DATA = ("--data-root", "corpora")


@pytest.fixture(scope="module")
def known():
    return parser()


def plan_of(run, device):
    words = bench_step.words_of(run, bench_step.MICRO_TOKENS[device], device)
    return expand([*words, *DATA], world_size=1)


@pytest.fixture(scope="module")
def plans():
    """Every row of one model on a GPU, and one row of each other model."""
    rows = list(bench_step.runs("cuda"))
    assert len({*rows}) == len(rows)
    chosen = [run for run in rows if run.model == "950m" or run in rows[:3]]
    return {run: plan_of(run, "cuda") for run in chosen}


def test_every_row_is_a_command_that_the_product_understands(plans, known):
    for run, plan in plans.items():
        refuse_unknown(plan.words, known)
        assert plan.options.model == run.model


def test_the_rows_of_a_machine_without_a_gpu_are_commands_too(known):
    rows = list(bench_step.runs("cpu"))
    assert {run.model for run in rows} == {"tiny"}
    for run in rows:
        refuse_unknown(plan_of(run, "cpu").words, known)


def test_every_row_in_fp8_has_sizes_that_a_hopper_multiplies(plans):
    hopper = fp8.Device(name="NVIDIA H200", capability=(9, 0), cuda=(13, 0))
    asked = [plan.words for plan in plans.values() if fp8.is_asked_for(plan.words)]
    assert len(asked) > 10
    for words in asked:
        fp8.refuse_impossible(words, device=hopper, transformer_engine="2.9")


def test_all_rows_have_the_same_tokens_in_a_step(plans):
    for plan in plans.values():
        flags = {flag.name: flag.values for flag in plan.flags}
        tokens = int(flags["seq-length"][0]) * int(flags["global-batch-size"][0])
        assert tokens == 32768


def test_the_most_wanted_rows_come_first():
    first = list(bench_step.runs("cuda"))[:6]
    assert [run.variant for run in first] == ["stock"] * 3 + ["ours"] * 3
    assert {run.precision for run in first} == {"bf16"}
    assert first[3] == Run(model="950m", length="2048", precision="bf16", variant="ours")


def test_every_op_is_switched_off_in_a_row_of_its_own():
    variants = bench_step.variants()
    off = {name for name, words in variants.items() if "without" in name}
    assert off == {f"{'kd-' if op == 'linear_kl' else ''}without-{op}" for op in KERNELS}


def test_stock_has_no_op_of_ours():
    assert "mlr1" not in bench_step.stock_kernels().values()
    assert bench_step.stock_kernels().keys() == KERNELS.keys()


def test_rows_are_selected_by_each_of_their_parts():
    asked = Namespace(
        models=["950m"], lengths=["2048"], precisions=["bf16"], variants=["ours", "stock"]
    )
    rows = list(bench_step.selected(bench_step.runs("cuda"), asked))
    assert [run.variant for run in rows] == ["stock", "ours"]


def test_precisions_that_this_machine_lacks_are_one_row_each(capsys):
    rows = [
        Run(model=model, length="2048", precision=precision, variant="ours")
        for precision in ("bf16", "fp8-delayed")
        for model in ("950m", "140m")
    ]
    kept = bench_step.possible(iter(rows), Table("T", ("a", "b", "c", "d", "e")))
    assert kept == rows[:2]
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == "| all | all | fp8-delayed | all | left out: it needs a GPU |"


def test_the_estimate_grows_with_model_and_length():
    def seconds(model, length):
        run = Run(model=model, length=length, precision="bf16", variant="ours")
        return bench_step.seconds(run, Namespace(micro_tokens=32768, steps=50))

    assert 25 < seconds("140m", "2048") < seconds("950m", "2048") < seconds("950m", "4096") < 90
    # Documents of 4,096 tokens, wherever they lie.
    assert seconds("950m", "32k-packed") == seconds("950m", "4096")


def test_a_row_shows_speed_beside_stock_and_the_time_of_a_step():
    run = Run(model="tiny", length="64", precision="fp32", variant="ours")
    rows = tuple(
        {"iteration": step, "tokens": 512 * step, "tokens_per_second": 2048.0, "mfu": None}
        | {"peak_memory_bytes": 1_040_000_000}
        for step in range(2, 7, 2)
    )
    cells = bench_step.cells(
        run,
        Outcome(rows=({"iteration": 1, "tokens": 512}, *rows), log="", why=None),
        {("tiny", "64", "fp32"): 1024.0},
        "cpu",
    )
    assert cells[4:] == ("2,048", "2.00", "", "250.0", "1.0", "")


def test_a_run_that_failed_is_a_row_with_its_reason():
    run = Run(model="950m", length="2048", precision="bf16", variant="stock")
    outcome = Outcome(rows=(), log="", why="torch.OutOfMemoryError: CUDA out of memory")
    stock = {}
    assert bench_step.cells(run, outcome, stock, "cuda")[4:] == (outcome.why,)
    assert not stock


@pytest.mark.parametrize("model", list(bench_convergence.SIZES))
@pytest.mark.parametrize("precision", [(), *PRECISIONS.values()], ids=str)
def test_every_curve_is_a_command_that_the_product_understands(model, precision, known):
    for size in bench_convergence.SIZES[model].values():
        words = ["--model", model, "--stage", "pretrain_phase1", *size.words, *DATA]
        words += precision or bench_convergence.FP32[model]
        plan = expand([*words, "--train-iters", "301"], world_size=1)
        refuse_unknown(plan.words, known)
        assert ("--bf16" in plan.words) == bool(precision)


def test_each_precision_is_what_its_name_says(known):
    for name, words in PRECISIONS.items():
        args, rest = known.parse_known_args(list(words))
        assert not rest
        assert args.bf16
        if name != "bf16":
            assert (args.fp8, name.split("-")[1]) == ("hybrid", args.fp8_recipe)
        assert args.first_last_layers_bf16 == name.endswith("-ends-bf16")


def test_equal_curves_are_no_distance_apart():
    curve = [8.0 - step / 100 for step in range(300)]
    found = distance(curve, curve)
    assert (found.window, found.end) == (0.0, 0.0)
    assert found.keeps(Limit(window=0.0, end=0.0))


def test_the_worst_window_counts_either_way_and_the_end_only_upwards():
    reference = [4.0] * 300
    dip = [*reference[:100], *[3.9] * 20, *reference[120:]]
    found = distance(dip, reference)
    assert found.window == pytest.approx(0.025)
    assert found.end == 0.0
    better = distance([*reference[:250], *[3.0] * 50], reference)
    assert better.end == pytest.approx(-0.25)
    assert better.keeps(Limit(window=0.3, end=0.0))


def test_the_first_steps_are_not_compared():
    assert distance([9.0] * 20 + [4.0] * 280, [4.0] * 300).window == 0.0


@pytest.mark.parametrize("place", [0, 100, 299])
def test_a_loss_that_is_no_number_breaks_every_limit(place):
    curve = [4.0] * 300
    curve[place] = nan
    kept = distance(curve, [4.0] * 300).keeps(Limit(window=1.0, end=1.0))
    assert kept == (place < 20)


def test_a_curve_above_its_limit_breaks_it():
    limit = bench_convergence.BF16
    worse = [4.0 * (1 + 2 * limit.end)] * 300
    assert not distance(worse, [4.0] * 300).keeps(limit)
