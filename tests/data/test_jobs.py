from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.encode import EncodePlan
from megatron_mlr1.data.jobs import Job, PreprocessPlan, prepare
from megatron_mlr1.data.journal import digest_of
from megatron_mlr1.data.tokenizers import TokenizerPlan
from megatron_mlr1.errors import DataError

BYTES = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")


@pytest.fixture
def plan(tmp_path: Path) -> PreprocessPlan:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "body": "b"}\n' * 4)
    return PreprocessPlan(
        inputs=(f"{tmp_path}/in.jsonl",),
        output_prefix=f"{tmp_path}/c",
        encode=EncodePlan(tokenizer=BYTES),
    )


def job(plan: PreprocessPlan, encode: dict[str, Any], **fields: Any) -> Job:
    return prepare(replace(plan, encode=replace(plan.encode, **encode), **fields))


@pytest.mark.parametrize(
    ("encode", "fields"),
    [
        ({"append_eod": True}, {}),
        ({"json_keys": ("body",)}, {}),
        ({"vocab_size": 300}, {}),
        ({"skip_bad": True}, {}),
        ({"tokenizer": replace(BYTES, vocab_size=600)}, {}),
        ({}, {"shuffle_seed": 0}),
        ({}, {"shard": (1, 2)}),
    ],
)
def test_the_digest_depends_on_all_that_decides_the_bytes(
    encode: dict[str, Any], fields: dict[str, Any], plan: PreprocessPlan
) -> None:
    assert digest_of(job(plan, encode, **fields).decides) != digest_of(prepare(plan).decides)


def test_the_digest_depends_on_the_content_of_the_input(
    plan: PreprocessPlan, tmp_path: Path
) -> None:
    before = prepare(plan).decides
    (tmp_path / "in.jsonl").write_text('{"text": "a", "body": "c"}\n' * 4)
    assert digest_of(prepare(plan).decides) != digest_of(before)


def test_the_digest_does_not_depend_on_how_the_work_is_done(plan: PreprocessPlan) -> None:
    same = job(plan, {"workers": 3}, overwrite=True, journal_bytes=1, output_prefix="elsewhere")
    assert digest_of(same.decides) == digest_of(prepare(plan).decides)


def test_the_shard_stands_in_the_names(plan: PreprocessPlan, tmp_path: Path) -> None:
    assert plan.corpus_prefix("text") == f"{tmp_path}/c_text_document"
    shard = replace(plan, shard=(3, 16))
    assert shard.corpus_prefix("text") == f"{tmp_path}/c-00003-of-00016_text_document"
    assert replace(plan, output_key="text").corpus_prefix("body") == plan.corpus_prefix("text")


def test_an_input_that_is_not_there_is_named(plan: PreprocessPlan, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        prepare(replace(plan, inputs=(f"{tmp_path}/missing.jsonl",)))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
