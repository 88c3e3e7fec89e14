"""What preprocessing refuses before, or instead of, any work; it leaves nothing then."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.encode import EncodePlan
from megatron_mlr1.data.jobs import PreprocessPlan, prepare
from megatron_mlr1.data.preprocess import preprocess
from megatron_mlr1.data.tokenizers import TokenizerPlan
from megatron_mlr1.errors import ConfigError, DataError, MachineError


def plan_of(source: Path, *, skip_bad: bool = False, **choices: Any) -> PreprocessPlan:
    tokenizer = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")
    given = {"output_prefix": f"{source.parent}/c"} | choices
    encode = EncodePlan(tokenizer=tokenizer, skip_bad=skip_bad)
    return PreprocessPlan(inputs=(str(source),), encode=encode, **given)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["c_text_document.bin", "c_text_document.idx.partial", "c.rejected.jsonl.partial"]
)
def test_a_folder_in_place_of_an_output_is_refused_before_any_work(
    name: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder"):
        preprocess(prepare(plan_of(source, overwrite=True)))
    assert files(tmp_path) == {"in.jsonl", name}


@pytest.mark.parametrize("text", ["", "[", '{"format": 1, "counts": {}, "plan": {}}'])
def test_a_journal_that_nobody_can_read_is_replaced_on_demand(
    text: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "c.journal.json").write_text(text)
    with pytest.raises((ConfigError, DataError), match="--overwrite"):
        preprocess(prepare(plan_of(source)))
    [summary] = preprocess(prepare(plan_of(source, overwrite=True)))
    assert summary.num_documents == 1
    assert "c.journal.json" not in files(tmp_path)


def test_a_missing_folder_is_named_and_not_a_file_in_it(source: Path, tmp_path: Path) -> None:
    job = prepare(plan_of(source, output_prefix=f"{tmp_path}/missing/c"))
    with pytest.raises(MachineError, match="missing: No such file or directory, so nothing can"):
        preprocess(job)


def test_records_that_are_all_rejected_are_told_so(source: Path, tmp_path: Path) -> None:
    source.write_text("3\n4\n")
    job = prepare(plan_of(source, skip_bad=True))
    with pytest.raises(DataError, match="All 2 records of the input were rejected"):
        preprocess(job)
    assert files(tmp_path) == {"in.jsonl"}
