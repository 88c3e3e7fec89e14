"""What the documents tell a person to type would be understood."""

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from benchmarks import bench_step
from megatron_mlr1 import cpu
from megatron_mlr1.recipes import expand
from megatron_mlr1.recipes.sheet import names

cpu.activate()

from megatron_mlr1.engine.command_line import parser, refuse_unknown  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    )
)
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "examples").rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
CODE = re.compile(r"```\w*\n.*?```|`[^`\n]+`", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
PLACEHOLDER = {"SIZE", "STAGE", "NAME", "N", "..."}
NOT_OURS = {
    "sbatch, srun": {"--nodes", "--gpus-per-node", "--exclusive", "--signal"}
    | {"--container-image", "--container-mounts"},
    "tensorboard": {"--logdir"},
    "pip": {"--no-build-isolation"},
    "setup.py": {"--inplace"},
}
"""Flags of programs that are not here to be asked."""
STEP = bench_step.words_parser("cpu")


def commands(document):
    """The commands of a document's blocks, a list of words each, without comments."""
    for block in BLOCK.findall((ROOT / document).read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|sbatch|bash|examples/)\b", line):
                yield shlex.split(line, comments=True)


def training():
    for document in DOCUMENTS:
        for words in commands(document):
            if "megatron_mlr1.train" in words:
                place = words.index("megatron_mlr1.train") + 1
                ours = shlex.split(shlex.join(words[place:]).split(" '[")[0])
                if not PLACEHOLDER & set(ours):
                    yield pytest.param(words[:place], ours, id=f"{document}: {shlex.join(ours)}")


def number(words, flag):
    return int(words[words.index(flag) + 1]) if flag in words else 1


@pytest.fixture(scope="module")
def engine():
    return parser()


@pytest.mark.parametrize(("launcher", "words"), list(training()))
def test_every_training_command_expands_to_flags_that_the_engine_knows(launcher, words, engine):
    world_size = number(launcher, "--nnodes") * number(launcher, "--nproc-per-node")
    plan = expand(words, world_size)
    plan.require_runnable()
    refuse_unknown(plan.words, engine)


def test_the_documents_show_how_to_train():
    assert len(list(training())) >= 3


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def help_of(words):
    """What a program of tools/ prints for --help, without a process of its own."""
    program, *rest = words
    text = io.StringIO()
    given, sys.argv = sys.argv, [program, *rest, "--help"]
    try:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / program), run_name="__main__")
    finally:
        sys.argv = given
    assert end.value.code == 0
    return text.getvalue()


@pytest.fixture(scope="module")
def known(engine):
    """Every flag that a program of tools/, the step's benchmark, the engine or torchrun has."""
    programs = [
        *([path.name] for path in (ROOT / "tools").glob("*.py")),
        ["recipes.py", "show"],
        ["convert_checkpoint.py", "megatron-to-hf"],
        ["convert_checkpoint.py", "hf-to-megatron"],
        *(["mixture.py", word] for word in ("show", "tokens", "plot")),
    ]
    flags = (
        flags_of(engine)
        | flags_of(get_args_parser())
        | flags_of(STEP)
        | set().union(*NOT_OURS.values())
    )
    return flags.union(*(FLAG.findall(help_of(program)) for program in programs))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_flag_in_a_document_exists(document, known):
    named = {
        flag for code in CODE.findall((ROOT / document).read_text()) for flag in FLAG.findall(code)
    }
    # Megatron-LM's flags that preprocessing refuses by name are named in its document.
    if document == Path("docs/data.md"):
        named -= {"--split-sentences", "--partitions"}
    assert named <= known


@pytest.mark.parametrize("stage_or_size", [*names("models"), *names("stages")])
def test_every_size_and_every_stage_is_in_the_documents(stage_or_size):
    assert any(stage_or_size in (ROOT / document).read_text() for document in DOCUMENTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_of_an_example_is_bash(script):
    checked = subprocess.run(
        ["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
