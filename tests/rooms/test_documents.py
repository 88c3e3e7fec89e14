"""What the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    )
)
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
FOLDERS = (
    "benchmarks|csrc|docs|examples|megatron_mlr1|tests|tools|"
    "checkpoint|data|engine|losses|model|ops|recipes"
)
# `path/to/file`, alone or as a word of a command, but no placeholder, pattern or output folder.
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w(?![\w*<{{-])")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def code(document):
    return CODE.findall((ROOT / document).read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_make_command_in_a_document_is_a_target(document):
    named = {name for text in code(document) for name in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    assert named <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_path_in_a_document_exists(document):
    # Beside the root, a path may be written from the package or from the document itself.
    starts = (ROOT, ROOT / "megatron_mlr1", (ROOT / document).parent)
    named = {path for text in code(document) for path in PATH.findall(text)}
    missing = {path for path in named if not any((start / path).exists() for start in starts)}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_to_a_file_leads_somewhere(document):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (ROOT / document).read_text())
    assert not {link for link in links if not ((ROOT / document).parent / link).exists()}


def test_every_make_target_says_what_it_is_for():
    text = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z-]+):[^=\n]*## \S", text, re.MULTILINE))
    assert explained == TARGETS
    assert {"demo", "test", "gpu-check"} <= TARGETS
