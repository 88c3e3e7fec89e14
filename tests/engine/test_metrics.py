"""Throughput, the log's line, and the record of every step."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_mlr1 import cpu
from megatron_mlr1.model.shape import named_shape

cpu.activate()

from megatron_mlr1.engine.metrics import (  # noqa: E402
    Curves,
    Record,
    Throughput,
    line,
    peak_memory,
    plot,
    throughput,
)

SPEED = Throughput(
    tokens_per_second=1.28e6, tokens_per_second_per_gpu=1e4, tflops_per_gpu=61.1, mfu=0.0618
)


def test_throughput_follows_from_tokens_seconds_and_devices():
    # 2,048 sequences of 2,048 tokens on 128 devices in 0.8 s; 6.1129 GFLOP a token at that length.
    speed = throughput(
        shape=named_shape("950m"),
        tokens=2048 * 2048,
        sum_squared_lengths=2048 * 2048**2,
        seconds=0.8,
        devices=128,
        peak_tflops=989.0,
    )
    assert speed.tokens_per_second == 2048 * 2048 / 0.8
    assert speed.tokens_per_second_per_gpu == 40960
    assert speed.tflops_per_gpu == pytest.approx(40960 * 6.1129e-3, rel=1e-4)
    assert speed.mfu == pytest.approx(speed.tflops_per_gpu / 989)


def test_no_mfu_is_made_up_where_the_peak_is_not_known():
    speed = throughput(
        shape=named_shape("950m"),
        tokens=1,
        sum_squared_lengths=1,
        seconds=1,
        devices=1,
        peak_tflops=None,
    )
    assert speed.mfu is None
    assert "peak unknown" in line(1, 1, speed, {}, None)


def test_the_line_shows_speed_and_corpora():
    text = line(10, 1_530_000_000, SPEED, {"wiki": 1000, "code": 2_500_000}, None)
    assert "memory" not in text
    for part in ("tokens seen: 1.53B", "tokens/s: 1.28M", "tokens/s/GPU: 10k", "MFU: 6.2 %"):
        assert part in text
    assert text.endswith("tokens by corpus: wiki 1k, code 2.5M")


def test_the_line_shows_the_peak_of_a_gpus_memory():
    assert "| peak memory: 71.3 GB | tokens by" in line(1, 1, SPEED, {"wiki": 1}, 71_340_000_000)


def test_there_is_no_peak_of_a_gpu_in_cpu_mode():
    assert peak_memory() is None


class Points:
    def __init__(self):
        self.points = {}

    def add_scalar(self, name, value, step):
        self.points[name] = (value, step)


def test_tensorboard_gets_the_same_figures():
    curves = Points()
    plot(curves, 10, 99, SPEED, {"wiki": 1000}, None)
    assert "memory/peak-gb" not in curves.points
    assert curves.points["throughput/mfu"] == (0.0618, 10)
    assert curves.points["tokens/seen"] == (99, 10)
    assert curves.points["tokens/wiki"] == (1000, 10)
    plot(curves, 11, 99, replace(SPEED, mfu=None), {}, 2_500_000_000)
    assert curves.points["memory/peak-gb"] == (2.5, 11)
    assert curves.points["throughput/mfu"] == (0.0618, 10)
    assert curves.points["throughput/tflops-per-gpu"] == (61.1, 11)


def rows(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_record_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "save" / "metrics.jsonl"
    first = Record(path, last_iteration=0)
    for iteration in range(1, 6):
        first.add({"iteration": iteration, "lm loss": 0.1 * iteration})
    with path.open("a") as file:
        file.write('{"iteration": 6, "lm l')  # a process killed in the middle of a line
    second = Record(path, last_iteration=3)
    second.add({"iteration": 4, "lm loss": 7.0})
    assert [row["iteration"] for row in rows(path)] == [1, 2, 3, 4]
    assert rows(path)[2]["lm loss"] == 0.1 * 3
    assert rows(path)[3]["lm loss"] == 7.0


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Let no file grow beyond `most` bytes, as a full disk would not; the system answers EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_does_not_take_follows_when_there_is_room(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    record = Record(path, last_iteration=0)
    record.add({"iteration": 1})
    with capfd.disabled(), small_files(path.stat().st_size + 7):
        record.add({"iteration": 2})
        record.add({"iteration": 3})
    assert path.read_text() == '{"iteration": 1}\n{"itera'
    record.add({"iteration": 4})
    assert [row["iteration"] for row in rows(path)] == [1, 2, 3, 4]


def test_a_full_disk_ends_tensorboards_curves_and_not_the_run(tmp_path, capsys):
    with (tmp_path / "events").open("wb", buffering=0) as file:
        curves = Curves(SimpleNamespace(add_scalar=file.write))
        curves.add_scalar(b"whole")
        with small_files(5):
            curves.add_scalar(b"more")
        curves.add_scalar(b"and more")
    assert (tmp_path / "events").read_bytes() == b"whole"
    assert capsys.readouterr().err.count("its curves end here") == 1
