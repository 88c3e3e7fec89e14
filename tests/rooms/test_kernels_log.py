"""The build's log tells registers, spills and warnings, and the check reads them."""

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / ".ci" / "kernels.py"
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 9.145 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""
INDEXED = CLEAN.replace("0 bytes stack frame", "16 bytes stack frame", 1)
SPILLED = CLEAN.replace("0 bytes spill stores", "820 bytes spill stores", 1)
OTHER_DEVICE = CLEAN.replace("sm_90a", "sm_80")
THEIRS = "/x/torch/include/c10/a.h(12): warning #20012-D: a torch header\n"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("kernels", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules["kernels"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kernels"]


@pytest.fixture
def judge(program, tmp_path):
    def run(text):
        log = tmp_path / "build.log"
        log.write_text(text)
        return program.main(str(log))

    return run


def test_each_kernel_is_told_with_registers_and_shared_memory(program, judge, capsys):
    assert judge(CLEAN + THEIRS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["40", "168"]
    assert program.kernels(CLEAN)[0].shared_bytes == 1024


def test_a_kernel_that_spills_is_refused_by_name(judge, capsys):
    assert judge(SPILLED) == 1
    assert "_Z1aPf spills" in capsys.readouterr().err


def test_an_array_in_local_memory_is_refused_but_for_the_digits_of_large_angles(judge, capsys):
    assert judge(INDEXED) == 1
    assert "_Z1aPf keeps an array of 16 bytes in local memory" in capsys.readouterr().err
    assert judge(INDEXED.replace("_Z1aPf", "_Z19qk_norm_rope_kernelPf")) == 0


def test_a_kernel_without_launch_bounds_is_found(program, tmp_path):
    (tmp_path / "a.cuh").write_text(
        "__global__ void __launch_bounds__(64)\n    bounded(int);\n__global__ void\nfree(int);\n"
    )
    assert program.unbounded(tmp_path) == ["a.cuh: free has no __launch_bounds__"]


def test_a_log_without_kernels_for_hopper_is_refused(judge, capsys):
    assert judge(OTHER_DEVICE) == 1
    assert "names no kernel for sm_90a" in capsys.readouterr().err


@pytest.mark.parametrize(
    "warning",
    [
        'csrc/a.cu(3): warning #177-D: variable "unused" was declared but never referenced',
        "/home/one/csrc/a.cu(3): warning #177-D: declared",
        "/home/one/csrc/cpu/a.cpp:12:3: warning: unused variable 'x' [-Wunused-variable]",
        "ptxas /tmp/a.ptx, line 12; warning : something is too large",
        "ptxas warning : stack size is not known",
    ],
)
def test_a_warning_of_our_own_sources_is_refused(warning, judge, capsys):
    assert judge(f"{CLEAN}{warning}\n{warning}\n") == 1
    assert capsys.readouterr().err.count("warning") == 1
