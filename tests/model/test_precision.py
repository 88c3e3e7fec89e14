"""An installed Transformer Engine that does not import: said before the engine meets it."""

import os
import subprocess
import sys

import pytest

WHY = "libcublas.so.13: cannot open shared object file"
ASK = """
from megatron_mlr1 import errors
from megatron_mlr1.model.precision import transformer_engine_version
try:
    print("version", transformer_engine_version())
except errors.MachineError as error:
    print(error)
"""
IN_CPU_MODE = """
from megatron_mlr1 import cpu
cpu.activate()
import megatron.core.dist_checkpointing  # imports it wherever it can
"""


@pytest.fixture
def says(tmp_path):
    """What a process prints where a Transformer Engine 2.18.0 of these lines is installed."""

    def run(lines, code):
        package = tmp_path / "transformer_engine"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "pytorch.py").write_text(lines)
        about = tmp_path / "transformer_engine-2.18.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Name: transformer_engine\nVersion: 2.18.0\n")
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_one_that_imports_has_a_version(says):
    assert says("", ASK) == "version 2.18.0\n"


@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
def test_one_that_does_not_import_is_named_with_its_reason_and_the_way_out(says, error):
    said = says(f"raise {error}({WHY!r})", ASK)
    assert f"Transformer Engine 2.18.0 is installed but does not import ({WHY})" in said
    assert "pip uninstall" in said


def test_cpu_mode_goes_on_without_it(says):
    assert says(f"raise OSError({WHY!r})", IN_CPU_MODE + ASK) == "version None\n"
