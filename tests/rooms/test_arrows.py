"""What the import contracts of pyproject.toml cannot say about who may know what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_mlr1"


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Dotted names of all that a file imports, `from a import b` as a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_called(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", getattr(node.func, "attr", None))


def test_only_the_engine_room_imports_the_engines_training_or_asks_for_its_arguments():
    knowing = [
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(f"{name}.".startswith("megatron.training.") for name in imported(path))
        or "get_args" in set(names_called(path))
    ]
    assert [path for path in knowing if not path.startswith("engine/")] == []


def test_one_file_of_the_engine_room_reads_the_parallel_state():
    reading = [
        path.name
        for path in (PACKAGE / "engine").rglob("*.py")
        if "megatron.core.parallel_state" in set(imported(path))
    ]
    assert len(reading) <= 1, reading


@pytest.mark.parametrize("room", ["errors", "options", "recipes", "recipes.plan"])
def test_plans_are_read_without_torch(room):
    program = f"import sys, megatron_mlr1.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
