"""What the benchmarks share: rows that stay, shares of a roofline, records of runs."""

import json
import os
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

from benchmarks.frame import contest, corpora, machine, roofline, training
from benchmarks.frame.contest import Case
from benchmarks.frame.roofline import ROOFS, Work
from benchmarks.frame.table import Table, parser
from benchmarks.frame.training import Outcome


def test_a_row_is_in_the_file_before_the_next_is_measured(tmp_path, capsys):
    file = tmp_path / "h200" / "step.md"
    table = Table(
        "Step", ("model", ">tokens/s"), about=("A machine.",), notes=("By x.",), file=file
    )
    table.add("950m", "1,000")
    text = file.read_text()
    assert text.splitlines() == [
        *("# Step", "", "A machine.", "", "| model | tokens/s |", "|---|---:|"),
        *("| 950m | 1,000 |", "", "By x."),
    ]
    table.add("360m: out of memory")
    assert file.read_text().splitlines()[7] == "| 360m: out of memory |  |"
    assert table.close("Stopped.") == file.read_text()
    assert [path.name for path in file.parent.iterdir()] == ["step.md"]
    assert "| 950m | 1,000 |" in capsys.readouterr().out


def test_a_table_without_a_file_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Table("T", ("a",)).close()
    assert not list(tmp_path.iterdir())


def test_a_row_with_too_many_cells_is_a_mistake():
    with pytest.raises(AssertionError, match="3 cells in 2 columns"):
        Table("T", ("a", "b")).add("1", "2", "3")


def test_the_claim_is_the_help_of_a_benchmark():
    text = parser("Claim: it is fast.\n\nMore.", "swiglu").format_help()
    assert "Claim: it is fast." in text
    assert "More." not in text
    assert "swiglu.md" in text


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx_6000_ada_generation"),
    ],
)
def test_results_lie_in_a_folder_of_their_device(name, folder):
    assert machine.folder_of(name) == folder


def test_results_of_a_cpu_lie_beside_the_other_results():
    assert machine.device() == "cpu"
    assert machine.results_file("step") == machine.RESULTS / "step.md"


def test_the_versions_of_this_machine_are_told():
    assert f"megatron-core {version('megatron-core')}" in machine.described()
    assert machine.version("no-such-package") is None


def test_a_peer_of_a_gpu_is_left_out_with_the_reason():
    assert machine.missing("torch", "torch") == "left out: it needs a GPU"


def test_the_longer_of_arithmetic_and_traffic_is_the_roofline():
    roof = ROOFS["h200"]
    products = Work(flops=790e12, bytes=1e9)
    assert products.seconds(roof) == pytest.approx(1.0)
    assert Work(flops=1e9, bytes=8.6e12).seconds(roof) == pytest.approx(2.0)
    assert roofline.share(products, 2.0, roof) == "50%"
    assert roofline.share(products, 2.0, None) == ""


def test_the_head_of_the_950m_is_49_ms_of_products_on_an_h200():
    from benchmarks.bench_linear_cross_entropy import case

    seconds = case(1536, 32768).work.seconds(ROOFS["h200"])
    assert seconds == pytest.approx(6 * 1536 * 128256 * 32768 / 790e12)
    assert seconds == pytest.approx(49.0e-3, rel=0.01)


def test_the_swiglu_of_the_950m_is_bound_by_memory():
    from benchmarks.bench_swiglu import BOTH, case

    made = case(6144, 32768, BOTH)
    # On this machine numbers are fp32: 8 x F of 4 bytes a token.
    assert made.work.bytes == 8 * 6144 * 32768 * 4
    assert made.work.seconds(ROOFS["h200"]) == made.work.bytes / 4.3e12


def product(case):
    """Multiply two matrices of a case's sizes."""
    x = contest.random(case.tokens, case.width)
    return lambda: x @ x.t()


CASES = []


def remembers(case):
    """Leave a trace in its process."""
    CASES.append(case)
    return lambda: None


def breaks(case):
    """Fail as a peer does that meets a size it has no kernel for."""

    def step():
        raise RuntimeError(f"no kernel | of {len(CASES)} for this size")

    return step


def dies(case):
    """Take the process down, as a fault of a driver does."""
    os._exit(7)


def lacks(case):
    """Fail as a peer does whose own needs are not there."""
    raise ModuleNotFoundError("No module named 'cutlass'")


SMALL = Case(cells=("8",), tokens=64, width=8, work=Work(flops=2 * 64 * 64 * 8))


def test_an_implementation_is_measured_in_seconds_and_bytes():
    found = contest.measure_here(product, SMALL)
    assert 0 < found.seconds < 1
    assert found.peak_bytes >= 0
    assert found.cpu_seconds > 0


def test_a_process_lasts_until_it_fails_and_the_next_begins_anew():
    def ask(prepare):
        return booth.measured(contest.Entrant(name="a peer", prepare=prepare), SMALL)

    with contest.Booth(lasts=True) as booth:
        assert isinstance(ask(remembers), contest.Measured)
        # It was prepared for a few tokens too.
        assert ask(breaks) == "failed: RuntimeError: no kernel / of 2 for this size"
        assert ask(breaks) == "failed: RuntimeError: no kernel / of 0 for this size"
        assert ask(dies) == "ended with code 7"


def test_what_can_never_work_is_one_row(capsys):
    made = contest.Contest(
        stem="x",
        title="X",
        about="",
        columns=("n",),
        rate="GB/s",
        entrants=[contest.Entrant(name="a peer", prepare=lacks)],
    )
    contest.hold(made, [SMALL, replace(SMALL, cells=("9",))], save=False)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 8", "a peer: failed: ModuleNotFoundError: No module named 'cutlass'"]
    ]


def record_of(speeds, interval=10):
    rows = []
    for step in range(1, interval * len(speeds) + 1):
        rows.append({"iteration": step, "tokens": 100 * step, "lm loss": 1.0})
        if step % interval == 0:
            speed = speeds[step // interval - 1]
            rows[-1] |= {"tokens_per_second": speed, "mfu": speed / 1000}
    return tuple(rows)


def test_speed_is_the_median_of_the_intervals_that_count():
    outcome = Outcome(rows=record_of([1.0, 100.0, 300.0, 120.0, 110.0]), log="", why=None)
    assert outcome.tokens_per_second(20) == 120.0
    assert outcome.mfu(20) == pytest.approx(0.12)
    assert outcome.tokens_per_second(50) is None


def test_an_unknown_peak_is_no_mfu():
    rows = tuple(row | {"mfu": None} if "mfu" in row else row for row in record_of([1.0, 2.0]))
    assert Outcome(rows=rows, log="", why=None).mfu(0) is None


def test_peak_memory_is_the_highest_of_the_record():
    rows = tuple(row | {"peak_memory_bytes": n} for n, row in enumerate(record_of([1.0]), 90))
    assert Outcome(rows=rows, log="", why=None).peak_bytes() == 99
    on_a_cpu = tuple(row | {"peak_memory_bytes": None} for row in rows)
    assert Outcome(rows=on_a_cpu, log="", why=None).peak_bytes() is None
    assert Outcome(rows=(), log="", why=None).peak_bytes() is None


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("a\nerror: --x is 1; it must be 2.\nb\n", "--x is 1; it must be 2."),
        ("[rank0]: torch.OutOfMemoryError: CUDA out\n", "torch.OutOfMemoryError: CUDA out"),
        ("Traceback\nValueError: a | b\n", "ValueError: a / b"),
        ("Killed\n", "Killed"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_run_that_failed_is_found_in_its_log(log, sentence):
    assert training.reason(log) == sentence


def test_half_a_line_of_a_record_is_not_read(tmp_path):
    (tmp_path / training.RECORD).write_text(json.dumps({"iteration": 1}) + '\n{"itera')
    assert training.read_record(tmp_path) == [{"iteration": 1}]


def test_the_language_is_the_same_everywhere_and_can_be_learned():
    tokens = corpora.language(np.random.default_rng(0), 4096, 20_000)
    assert tokens[:8].tolist() == [199, 3162, 1, 3234, 866, 1982, 1645, 431]
    assert (tokens.min(), tokens.max()) >= (1, 1)
    assert tokens.max() < 4096
    follows = tokens[1:] == 1 + (48_271 * tokens[:-1] + 7) % 4095
    assert 0.48 < follows.mean() < 0.54
