import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_mlr1.data.chat_corpus import ChatPlan, ChatSummary, make_packs
from megatron_mlr1.data.chat_encode import ChatEncoding
from megatron_mlr1.data.chat_template import LLAMA_TEMPLATE
from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.pack_files import loss_path
from megatron_mlr1.data.provenance import read_record
from megatron_mlr1.errors import ConfigError, DataError
from tests.support.chats import chat, random_chats, write_lines, write_tokenizer

CHATS = random_chats(120, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(folder: Path, prefix: Path, *inputs: Path, **options: Any) -> ChatSummary:
    encoding: dict[str, Any] = {"train_on": "assistant", "pack_length": 2048}
    for name in ("train_on", "truncate", "questions", "pack_length"):
        if name in options:
            encoding[name] = options.pop(name)
    workers = options.pop("workers", 1)
    return make_packs(
        ChatPlan(
            inputs=tuple(map(str, inputs)),
            output_prefix=str(prefix),
            encoding=ChatEncoding(tokenizer_model=str(folder), **encoding),
            workers=workers,
            **options,
        )
    )


def stored(prefix: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give the ids and targets of every chat, in the order of the packs."""
    corpus = open_corpus(prefix)
    targets = np.fromfile(loss_path(prefix), np.uint8)
    begins = corpus.begins // corpus.tokens.dtype.itemsize
    return [
        (tuple(corpus.tokens[a : a + n].tolist()), tuple(targets[a : a + n].tolist()))
        for a, n in zip(begins.tolist(), corpus.lengths.tolist(), strict=True)
    ]


def lines(path: Path, chats: list[Any] = CHATS) -> Path:
    return write_lines(path, [{"messages": messages} for messages in chats])


def test_every_chat_is_stored_once_with_the_ids_of_transformers(
    folder: Path, tmp_path: Path
) -> None:
    summary = make(folder, tmp_path / "x", lines(tmp_path / "a.jsonl"))
    assert summary.fill >= 0.98
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAMA_TEMPLATE.read_text()
    want = [
        tuple(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        for messages in CHATS
    ]
    kept = stored(summary.prefix)
    assert sorted(ids for ids, _ in kept) == sorted(want)
    assert [ids for ids, _ in kept] != want
    header = tuple(tokenizer.encode("<|start_header_id|>assistant<|end_header_id|>\n\n"))
    for ids, targets in kept:
        begins = [n for n in range(1, len(ids)) if targets[n] and not targets[n - 1]]
        assert all(ids[n - len(header) : n] == header for n in begins)
        assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 1 + 2 * len(begins)
    record = read_record(summary.prefix)
    assert record is not None
    assert (record.kind, record.pack_length, record.documents) == ("packs", 2048, summary.packs)
    assert record.trained_tokens == summary.trained_tokens
    assert summary.trained_tokens == sum(sum(targets) for _, targets in kept)
    assert not list(tmp_path.glob("*partial*"))
    assert not (tmp_path / "x.rejected.jsonl").exists()


def test_workers_and_files_do_not_change_the_bytes(folder: Path, tmp_path: Path) -> None:
    whole = lines(tmp_path / "a.jsonl")
    parts = [lines(tmp_path / f"{n}.jsonl", CHATS[n * 40 : n * 40 + 40]) for n in range(3)]
    one = make(folder, tmp_path / "one", whole)
    two = make(folder, tmp_path / "two", *parts, workers=2)
    for end in ("bin", "idx", "loss.bin"):
        assert Path(f"{one.prefix}.{end}").read_bytes() == Path(f"{two.prefix}.{end}").read_bytes()
    other = make(folder, tmp_path / "other", whole, seed=1)
    assert sorted(stored(one.prefix)) == sorted(stored(other.prefix))
    assert stored(one.prefix) != stored(other.prefix)


def test_what_is_no_chat_is_counted_and_kept_aside(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [CHATS[0], chat("q"), chat("q", "<|eot_id|>"), CHATS[1]])
    with path.open("a") as file:
        file.write("{\n")
    summary = make(folder, tmp_path / "x", path, skip_bad=True)
    assert (summary.records, summary.chats, summary.rejected) == (5, 2, 3)
    kept = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").open()]
    assert [row["where"] for row in kept] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert kept[0]["record"] == {"messages": chat("q")}
    assert "ends with a message of user" in kept[0]["reason"]
    assert summary.reasons.total() == 3
    record = read_record(summary.prefix)
    assert record is not None
    assert record.rejected == 3


def test_what_is_no_chat_stops_the_run_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [CHATS[0], chat("q"), CHATS[1]])
    with pytest.raises(DataError, match=r"a\.jsonl:2: ends with a message of user"):
        make(folder, tmp_path / "x", path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_chat_that_is_too_long_is_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "x " * 500), chat("q", "b")])
    summary = make(folder, tmp_path / "x", path, pack_length=256)
    assert (summary.chats, summary.too_long, summary.rejected) == (2, 1, 0)
    assert summary.longest > 256
    (row,) = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").open()]
    assert row["reason"] == f"{summary.longest} tokens, and a pack holds 256"


def test_a_chat_that_is_too_long_is_cut_where_that_is_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    no_answer = chat("q " * 500, "a")
    path = lines(tmp_path / "a.jsonl", [chat("q", "x " * 500), no_answer, chat("q", "b")])
    summary = make(folder, tmp_path / "x", path, pack_length=256, truncate=True)
    assert (summary.chats, summary.cut, summary.too_long) == (2, 1, 1)
    assert max(len(ids) for ids, _ in stored(summary.prefix)) == 256


def test_all_layouts_may_stand_in_one_corpus(folder: Path, tmp_path: Path) -> None:
    inputs = [
        write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a"}]),
        write_lines(tmp_path / "b.jsonl", [{"problem": "q", "generated_solution": "a"}]),
        write_lines(tmp_path / "c.jsonl", [{"input": "q", "output": "a", "expected_answer": "a"}]),
        write_lines(
            tmp_path / "d.jsonl", [{"question": "-", "r1_generation": "a", "question_id": "1"}]
        ),
        lines(tmp_path / "e.jsonl", [chat("q", "a")]),
    ]
    questions = write_lines(tmp_path / "questions", [{"question_id": "1", "question": "q"}])
    summary = make(folder, tmp_path / "x", *inputs, questions=questions)
    kept = stored(summary.prefix)
    assert len(kept) == 5
    assert len(set(kept)) == 1


def test_everything_may_be_trained_but_what_nothing_predicts(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [chat("q", "a")] * 3)
    summary = make(folder, tmp_path / "x", path, train_on="all")
    for _, targets in stored(summary.prefix):
        assert targets[0] == 0
        assert all(targets[1:])


def test_a_corpus_that_is_there_is_replaced_on_demand_alone(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [*CHATS[:5], chat("q")])
    first = make(folder, tmp_path / "x", path, skip_bad=True)
    before = stored(first.prefix)
    with pytest.raises(ConfigError, match="is there already"):
        make(folder, tmp_path / "x", path, skip_bad=True)
    assert stored(first.prefix) == before
    lines(path, CHATS[5:9])
    make(folder, tmp_path / "x", path, overwrite=True)
    assert len(stored(first.prefix)) == 4
    assert not (tmp_path / "x.rejected.jsonl").exists()


def test_no_chat_at_all_is_refused(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [chat("q", "x " * 500)])
    with pytest.raises(DataError, match="None of 1 records is a chat of at most 64 tokens"):
        make(folder, tmp_path / "x", path, pack_length=64)
    with pytest.raises(ConfigError, match="--workers is 0"):
        make(folder, tmp_path / "x", path, workers=0)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack_length": 0}, "--pack-length is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"workers": 0}, "--workers is 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_any_chat_is_read(
    options: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "no-tokenizer", tmp_path / "x", tmp_path / "none.jsonl", **options)


def test_a_folder_in_place_of_an_output_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x_chat_document.loss.bin").mkdir()
    with pytest.raises(ConfigError, match=r"loss\.bin is a folder"):
        make(folder, tmp_path / "x", lines(tmp_path / "a.jsonl"), overwrite=True)
