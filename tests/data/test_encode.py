import gzip
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mlr1.data import encode, pipeline
from megatron_mlr1.data.encode import (
    EncodedBatch,
    EncodePlan,
    Position,
    describe_tokenizer,
    encode_units,
)
from megatron_mlr1.data.inputs import find_units
from megatron_mlr1.data.tokenizers import TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import ConfigError, DataError

BYTES = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")
Text = str | list[str]


def write_lines(path: Path, texts: Sequence[Text]) -> Path:
    lines = [json.dumps({"text": text, "number": str(n)}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def documents(batches: Sequence[EncodedBatch], key: str = "text") -> list[list[list[int]]]:
    """Take blocks apart: sequences of documents."""
    found = []
    for batch in batches:
        block = batch.blocks[key]
        in_order = iter(np.split(block.tokens, np.cumsum(block.lengths)))
        found += [[next(in_order).tolist() for _ in range(count)] for count in block.sequences]
    return found


def by_definition(plan: TokenizerPlan, texts: Sequence[Text], eod: bool) -> list[list[list[int]]]:
    tokenizer = load_tokenizer(plan)
    expected = []
    for text in texts:
        lists = tokenizer.encode(text if isinstance(text, list) else [text])
        sequences = [ids for ids in lists if ids]
        if sequences and eod:
            sequences[-1] = [*sequences[-1], tokenizer.eod or 0]
        expected.append(sequences)
    return expected


@pytest.fixture
def plans(
    train_bpe: Callable[..., Path],
    sentencepiece_model: Path,
    tiktoken_ranks: Path,
    tmp_path: Path,
) -> dict[str, TokenizerPlan]:
    folders = {begins: train_bpe(tmp_path / f"bpe{begins}", begins=begins) for begins in (0, 1)}
    models = {
        "bpe": ("HuggingFaceTokenizer", folders[0]),
        "bpe with begin": ("HuggingFaceTokenizer", folders[1]),
        "sentencepiece": ("SentencePieceTokenizer", sentencepiece_model),
        "tiktoken": ("TikTokenizer", tiktoken_ranks),
    }
    return {"bytes": BYTES} | {
        name: TokenizerPlan(tokenizer_type=kind, tokenizer_model=str(model), vocab_size=1300)
        for name, (kind, model) in models.items()
    }


@pytest.mark.parametrize(
    ("name", "few_characters", "engine"),
    [
        ("bytes", 0, "bytes"), ("bytes", 2**18, "bytes"),
        ("sentencepiece", 0, "sentencepiece"), ("sentencepiece", 2**18, "sentencepiece"),
        ("tiktoken", 0, "tiktoken"), ("tiktoken", 2**18, "tiktoken"),
        ("bpe", 0, "gigatoken"), ("bpe", 2**18, "tokenizers"),
        ("bpe with begin", 0, "gigatoken"), ("bpe with begin", 2**18, "tokenizers"),
    ],
)  # fmt: skip
def test_documents_are_those_of_the_definition(
    name: str,
    few_characters: int,
    engine: str,
    texts: list[str],
    plans: dict[str, TokenizerPlan],
    tmp_path: Path,
) -> None:
    shards: list[list[Text]] = [[*texts], ["a", ["b c", "", "d"], [], ["", ""]], [*texts[::-1]]]
    inputs = [str(write_lines(tmp_path / f"{n}.jsonl", each)) for n, each in enumerate(shards)]
    tokenizer = plans[name]
    append_eod = few_characters == 0
    plan = EncodePlan(
        tokenizer=tokenizer, append_eod=append_eod, workers=2, few_characters=few_characters
    )

    batches = list(encode_units(plan, find_units(inputs)))

    every = [text for shard in shards for text in shard]
    assert documents(batches) == by_definition(tokenizer, every, append_eod)
    described = describe_tokenizer(tokenizer)
    assert {batch.blocks["text"].tokens.dtype.name for batch in batches} == {described["dtype"]}
    assert {batch.engine.split()[0] for batch in batches} == {engine}
    assert sum(batch.num_records for batch in batches) == len(every)


def test_few_texts_are_encoded_without_loading_the_fast_tokenizer(
    plans: dict[str, TokenizerPlan], tmp_path: Path
) -> None:
    inputs = [str(write_lines(tmp_path / f"{n}.jsonl", ["four", "five5"])) for n in range(3)]
    units = find_units(inputs)
    for few_characters, start, num_batches, engine in (
        (28, None, 3, "tokenizers"),
        (27, None, 3, "gigatoken"),
        (27, Position(1, 0), 2, "tokenizers"),  # what is left counts
        (27, Position(2, units[2].stored_bytes), 0, None),
    ):
        plan = EncodePlan(tokenizer=plans["bpe"], few_characters=few_characters)
        batches = list(encode_units(plan, units, start))
        expected = by_definition(plans["bpe"], ["four", "five5"] * num_batches, False)
        assert documents(batches) == expected
        assert {batch.engine.split()[0] for batch in batches} == ({engine} - {None})


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_is_that_of_the_input_for_any_number_of_workers(
    workers: int,
    plans: dict[str, TokenizerPlan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encode, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(pipeline, "TASK_CHARACTERS", 30_000)
    # The first documents take longest.
    texts = [f"{n} " * (60_000 // (n + 1) + 50) for n in range(1500)]
    path = write_lines(tmp_path / "in.jsonl", texts)
    plan = EncodePlan(tokenizer=plans["sentencepiece"], workers=workers)
    batches = list(encode_units(plan, find_units([str(path)])))
    assert len(batches) > 5
    begins = [document[0][:8] for document in documents(batches)]
    expected = by_definition(plans["sentencepiece"], [text[:100] for text in texts], False)
    assert begins == [document[0][:8] for document in expected]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_run_goes_on_at_any_position_of_any_file(
    ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = [f"{n} " * (n % 90) for n in range(600)]
    inputs = []
    for part in range(3):
        path = tmp_path / f"{part}{ending}"
        lines = write_lines(tmp_path / "lines", texts[part::3])
        if ending == ".parquet":
            pq.write_table(pa.table({"text": texts[part::3]}), path, row_group_size=40)
        else:
            data = lines.read_bytes()
            path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
        inputs.append(str(path))
    units = find_units(inputs)
    plan = EncodePlan(tokenizer=BYTES, append_eod=True)
    monkeypatch.setattr(encode, "BLOCK_BYTES", 5000)
    batches = list(encode_units(plan, units))
    whole = documents(batches)
    assert len(whole) == 600
    for index, batch in enumerate(batches):
        position = Position(**json.loads(json.dumps(asdict(batch.end))))
        rest = list(encode_units(plan, units, position))
        assert documents(batches[: index + 1]) + documents(rest) == whole
    assert {batch.end.unit for batch in batches} == {0, 1, 2}


def test_shards_join_to_the_whole(tmp_path: Path) -> None:
    inputs = [
        str(write_lines(tmp_path / f"{n}.jsonl", [f"{n} {m} " * 9 for m in range(100 + 50 * n)]))
        for n in range(4)
    ]
    plan = EncodePlan(tokenizer=BYTES)
    whole = documents(list(encode_units(plan, find_units(inputs))))
    for parts in (2, 7):
        joined = []
        for part in range(parts):
            joined += documents(list(encode_units(plan, find_units(inputs, (part, parts)))))
        assert joined == whole


def test_each_key_is_encoded_and_bad_records_are_left_out_of_all(
    plans: dict[str, TokenizerPlan], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", ["ab", "", "cde", "f"])
    with path.open("a") as file:
        file.write('{"text": "x"}\nbroken\n{"text": "last", "number": "9"}\n')
    plan = EncodePlan(tokenizer=plans["bpe"], json_keys=("number", "text"), skip_bad=True)
    [batch] = encode_units(plan, find_units([str(path)]))
    expected = by_definition(plans["bpe"], ["ab", "", "cde", "f", "last"], False)
    assert documents([batch]) == expected
    assert len(documents([batch], "number")) == 5
    assert [rejected.where for rejected in batch.rejected] == [f"{path}:5", f"{path}:6"]
    assert [rejected.raw for rejected in batch.rejected] == [b'{"text": "x"}', b"broken"]
    assert batch.num_records == 7
    assert batch.stored_bytes == path.stat().st_size


def test_the_first_bad_record_stops_the_run_behind_what_was_good(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "0.jsonl", ["good"] * 10)
    bad = write_lines(tmp_path / "1.jsonl", ["x" * 1000] * 4000)
    with bad.open("a") as file:
        file.write('{"text": 3}\nbroken\n')
    found: list[EncodedBatch] = []
    batches = encode_units(EncodePlan(tokenizer=BYTES), find_units([str(good), str(bad)]))
    with pytest.raises(DataError, match=r"1\.jsonl:4001: 'text' holds a number"):
        found.extend(batches)
    assert len(documents(found)) >= 10


@pytest.mark.parametrize(
    ("texts", "choices", "message"),
    [
        (["abc", "", ["y", "yz"], "x"], {"vocab_size": 122}, r":3: token id 122 is outside"),
        (["abc"], {"vocab_size": 0, "append_eod": True}, "--append-eod would write id 0"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(
    texts: list[Text], choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts)
    with pytest.raises((DataError, ConfigError), match=message):
        list(encode_units(EncodePlan(tokenizer=BYTES, **choices), find_units([str(path)])))


def test_an_id_of_the_template_outside_the_vocabulary_is_refused(
    plans: dict[str, TokenizerPlan], tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", [""])
    plan = EncodePlan(tokenizer=plans["bpe with begin"], vocab_size=0)
    with pytest.raises(DataError, match=r"in\.jsonl:1: token id 0 is outside the vocabulary of 0"):
        list(encode_units(plan, find_units([str(path)])))


def test_an_end_that_the_tokenizer_lacks_is_refused_at_once(
    train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=False, eos_token=None)
    tokenizer = TokenizerPlan(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    with pytest.raises(ConfigError, match="end-of-sequence"):
        encode_units(EncodePlan(tokenizer=tokenizer, append_eod=True), [])
    assert describe_tokenizer(tokenizer)["eod"] is None


def test_a_run_that_is_left_leaves_no_thread(tmp_path: Path) -> None:
    inputs = [str(write_lines(tmp_path / f"{n}.jsonl", ["a"] * 5)) for n in range(20)]
    before = threading.active_count()
    batches = encode_units(EncodePlan(tokenizer=BYTES), find_units(inputs))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_description_survives_json(plans: dict[str, TokenizerPlan]) -> None:
    for plan in plans.values():
        described = describe_tokenizer(plan)
        assert json.loads(json.dumps(described)) == described
        assert described["type"] == plan.tokenizer_type
        assert len(described["sha256"]) == 64
