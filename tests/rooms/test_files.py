"""Files keep the sizes, names and places that the rooms give them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_mlr1", "csrc", "tools", "examples", "benchmarks", "tests")
MOST_LINES = {".py": 400, ".sh": 400, ".cpp": 400, ".h": 400, ".cu": 600, ".cuh": 400}
SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}


def sources():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in MOST_LINES and "build" not in path.parts:
                yield path.relative_to(ROOT)


def test_no_file_is_longer_than_a_person_reads():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert lengths, "no sources were found"
    assert not {path: n for path, n in lengths.items() if n > MOST_LINES[path.suffix]}


def test_every_file_has_a_name_that_says_what_it_knows():
    folder_for_shared_headers = Path("csrc/common")
    silent = [
        path
        for path in sources()
        if SAY_NOTHING & {part.lower() for part in (path.stem, *path.parts[:-1])}
        and path.parent != folder_for_shared_headers
    ]
    assert not silent


STEMS = sorted(
    {
        path.stem
        for path in sources()
        if path.parts[0] == "csrc" and path.parent != Path("csrc/common")
    }
)


@pytest.mark.parametrize("stem", STEMS)
def test_every_compiled_row_has_its_op_and_its_test(stem):
    assert (ROOT / f"megatron_mlr1/ops/{stem}.py").exists()
    assert (ROOT / f"tests/ops/test_{stem}.py").exists()
