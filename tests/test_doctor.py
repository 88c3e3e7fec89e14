"""The doctor's words for machines of every kind, and what it sees on this one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mlr1 import doctor
from megatron_mlr1.doctor import Gpu, Machine, OpRows

LAPTOP = Machine(
    python="3.12.1",
    system="Linux x86_64",
    num_cores=2,
    memory_gib=7.6,
    torch="2.11.0",
    megatron_core="0.19.2",
    has_dataset_helpers=True,
)
H100 = Gpu(name="NVIDIA H100", memory_gib=79.6, capability=(9, 0))
NODE = replace(
    LAPTOP, torch_cuda="13.0", gpus=(H100,) * 8, transformer_engine="2.9", driver="580.1"
)


def words(machine):
    return " ".join(doctor.meaning(machine))


def test_a_laptop_is_told_that_it_trains_tiny_on_its_cpu():
    assert words(LAPTOP).startswith("CPU mode")
    assert "tiny" in words(LAPTOP)
    assert "FP8: no" in words(LAPTOP)


def test_a_node_of_h100_is_told_its_fp8_recipes_and_sizes():
    assert "8 process(es)" in words(NODE)
    assert "950m" in words(NODE)
    assert "tensorwise | delayed | blockwise" in words(NODE)
    assert "Attention: Transformer Engine's. Optimizer: Transformer Engine's Adam." in words(NODE)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "FP8: no, the GPU must have compute capability 8.9"),
        ((8, 9), "tensorwise | delayed."),
        ((10, 0), "tensorwise | delayed | mxfp8"),
    ],
)
def test_fp8_follows_the_capability_of_the_weakest_gpu(capability, expected):
    weakest = replace(H100, capability=capability)
    strong = replace(H100, capability=(12, 0))
    assert expected in words(replace(NODE, gpus=(strong, weakest)))


def test_a_gpu_without_transformer_engine_is_told_how_to_get_fp8():
    machine = replace(NODE, transformer_engine=None, apex="0.1", has_nvidia_apex=True)
    assert "[fp8]" in words(machine)
    assert "Apex's Adam" in words(machine)


def test_the_size_that_is_suggested_fits_the_smallest_gpu():
    # 18 bytes for each of 359M parameters are 6.03 GiB, and half of the memory is for the rest.
    small = replace(H100, memory_gib=12.5)
    assert "tiny, 140m, 360m fit" in words(replace(NODE, gpus=(H100, small)))


def test_a_package_called_apex_that_is_not_nvidias_is_named_as_such():
    facts = dict(doctor.facts(replace(LAPTOP, apex="0.9.10")))
    assert "not NVIDIA's" in facts["Apex"]


def test_a_missing_engine_is_an_error_and_nothing_else_is_promised():
    bare = Machine(python="3.12.1", system="Linux", num_cores=1, memory_gib=None)
    assert "Megatron-Core" in str(doctor.shortcoming(bare, need_gpu=False))
    assert "Nothing trains here" in words(bare)
    assert dict(doctor.facts(bare))["torch"] == "not installed"


def test_a_fault_is_an_error_whatever_else_is_there():
    machine = replace(NODE, fault="the driver fails")
    assert doctor.shortcoming(machine, need_gpu=False) == "the driver fails"
    assert "GPU" not in words(machine)


def test_the_rows_of_each_op_are_listed():
    machine = replace(LAPTOP, ops=(OpRows(name="mlr1::x", devices=("CPU",)),))
    assert dict(doctor.facts(machine))["  mlr1::x"] == "CPU"


def test_the_screen_is_one_screen():
    lines = doctor.report(doctor.inspect_machine()).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_the_drivers_version_is_read_from_the_kernel(tmp_path):
    version = tmp_path / "version"
    assert doctor._driver(version) is None
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\n")
    assert doctor._driver(version) == "580.95.05"


def test_a_gpu_is_needed_only_where_it_was_asked_for():
    assert doctor.shortcoming(LAPTOP, need_gpu=False) is None
    assert doctor.shortcoming(NODE, need_gpu=True) is None
    assert "needs an NVIDIA GPU" in str(doctor.shortcoming(LAPTOP, need_gpu=True))


def test_it_runs_where_nothing_is_installed():
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": os.environ["PATH"]}
    run = subprocess.run(
        [sys.executable, "-S", "-m", "megatron_mlr1.doctor"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "not installed" in run.stdout
    assert run.stderr.startswith("\nERROR: torch cannot be imported")
