import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.preprocess import PreprocessPlan, preprocess
from megatron_mlr1.data.tokenizers import ByteTokenizer, TokenizerPlan, load_tokenizer
from megatron_mlr1.errors import ConfigError, DataError, MachineError

BYTES = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")
Text = str | list[str]


def write_lines(path: Path, texts: Sequence[Text]) -> Path:
    lines = [json.dumps({"text": text, "number": str(n)}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def plan_of(folder: Path, *inputs: Path, **choices: Any) -> PreprocessPlan:
    choices = {"workers": 1} | choices
    return PreprocessPlan(inputs=inputs, output_prefix=f"{folder}/c", **choices)


def write_by_the_engine(
    prefix: str, tokenizer: Any, documents: Sequence[Text], append_eod: bool
) -> None:
    """Write a corpus with the engine's builder, step by step as its own tool does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        sentences = document if isinstance(document, list) else [document]
        sequences = [ids for ids in map(tokenizer.tokenize, sentences) if ids]
        if sequences and append_eod:
            sequences[-1].append(tokenizer.eod)
        tokens = [token for ids in sequences for token in ids]
        builder.add_document(tokens, [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def tokenizer_plan(
    request: pytest.FixtureRequest,
    train_bpe: Callable[..., Path],
    sentencepiece_model: Path,
    tmp_path: Path,
) -> TokenizerPlan:
    if request.param == "bytes":
        return BYTES
    if request.param == "sentencepiece":
        return TokenizerPlan(
            tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(sentencepiece_model)
        )
    folder = train_bpe(tmp_path / "bpe", begins=request.param == "bpe with begin")
    return TokenizerPlan(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize(
    "tokenizer_plan", ["bytes", "sentencepiece", "bpe", "bpe with begin"], indirect=True
)
def test_files_are_those_of_the_engine(
    tokenizer_plan: TokenizerPlan,
    append_eod: bool,
    texts: list[str],
    engine_tokenizer: Callable[[TokenizerPlan], Any],
    tmp_path: Path,
) -> None:
    shards: list[Sequence[Text]] = [texts, ["a", ["b c", "", "d"], [], ["", ""]], texts[::-1]]
    inputs = [write_lines(tmp_path / f"{n}.jsonl", shard) for n, shard in enumerate(shards)]
    plan = plan_of(tmp_path, *inputs, workers=2, append_eod=append_eod)

    preprocess(plan, load_tokenizer(tokenizer_plan))

    engine = engine_tokenizer(tokenizer_plan)
    documents = [text for shard in shards for text in shard]
    write_by_the_engine(f"{tmp_path}/engine", engine, documents, append_eod)
    for kind in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{kind}" for name in ("c_text_document", "engine"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_documents_stand_in_order_for_any_number_of_workers(tmp_path: Path) -> None:
    # About 5 MiB, so many batches; the first documents take longest.
    documents = [f"{n} " * (60_000 // (n + 1) + 500) for n in range(1500)]
    path = write_lines(tmp_path / "in.jsonl", documents)

    preprocess(plan_of(tmp_path, path, workers=3, append_eod=True), ByteTokenizer())

    corpus = open_corpus(f"{tmp_path}/c_text_document")
    expected = b"".join(text.encode() + b"\x00" for text in documents)
    assert path.stat().st_size > 4 * 2**20
    assert corpus.tokens.astype("u1").tobytes() == expected
    assert corpus.document_ends.tolist() == list(range(len(documents) + 1))


def test_each_key_becomes_a_corpus_and_progress_counts_all_input(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{n}.jsonl", ["ab", "", "cde"]) for n in range(2)]
    told: list[tuple[int, int]] = []
    plan = plan_of(tmp_path, *paths, json_keys=("text", "number"))

    summaries = preprocess(plan, ByteTokenizer(), lambda *count: told.append(count))

    assert [(s.prefix, s.num_documents, s.num_tokens, s.dtype) for s in summaries] == [
        (f"{tmp_path}/c_text_document", 6, 10, "uint16"),
        (f"{tmp_path}/c_number_document", 6, 6, "uint16"),
    ]
    assert [sum(count) for count in zip(*told, strict=True)] == [
        6,
        sum(path.stat().st_size for path in paths),
    ]


def test_a_wrong_line_far_down_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    texts = ["x" * 1000] * 4000
    path = write_lines(tmp_path / "in.jsonl", texts)
    with path.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:4001: 'text' holds a int"):
        preprocess(plan_of(tmp_path, path, workers=2), ByteTokenizer())
    assert files(tmp_path) == {"in.jsonl"}


@pytest.mark.parametrize(
    ("texts", "choices", "message"),
    [
        (["abc", "", ["y", "yz"], "x"], {"vocab_size": 122}, r":3: token id 122 is outside"),
        (["abc"], {"vocab_size": 0, "append_eod": True}, "--append-eod would write id 0"),
        (["", []], {}, "'text' is empty in all 2 documents"),
        (["a"], {"json_keys": ("text", "body")}, r":1: no key 'body'"),
    ],
)
def test_what_cannot_become_a_corpus_is_refused_and_nothing_is_left(
    texts: list[Text], choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts)
    with pytest.raises((DataError, ConfigError), match=message):
        preprocess(plan_of(tmp_path, path, **choices), ByteTokenizer())
    assert files(tmp_path) == {"in.jsonl"}


def test_an_added_token_beyond_the_declared_vocabulary_is_refused(
    train_bpe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = train_bpe(tmp_path / "bpe", begins=False, extra_special_tokens=["<|new|>"])
    tokenizer = load_tokenizer(
        TokenizerPlan(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    )
    declared = tokenizer.vocab_size - 1
    path = write_lines(tmp_path / "in.jsonl", ["old text", "a <|new|> token"])
    with pytest.raises(DataError, match=rf"in\.jsonl:2: token id {declared} is outside"):
        preprocess(plan_of(tmp_path, path, vocab_size=declared), tokenizer)
    preprocess(plan_of(tmp_path, path), tokenizer)


def test_an_end_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(ConfigError, match="end-of-sequence"):
        preprocess(plan_of(tmp_path, path, append_eod=True), ByteTokenizer(eod=None))


def test_an_existing_corpus_is_kept_unless_overwriting_is_wanted(tmp_path: Path) -> None:
    old, new = (write_lines(tmp_path / name, [name]) for name in ("old", "new"))
    preprocess(plan_of(tmp_path, old), ByteTokenizer())
    with pytest.raises(ConfigError, match="--overwrite"):
        preprocess(plan_of(tmp_path, new, json_keys=("number", "text")), ByteTokenizer())
    assert open_corpus(f"{tmp_path}/c_text_document").tokens.tolist() == list(b"old")
    assert files(tmp_path) == {"old", "new", "c_text_document.bin", "c_text_document.idx"}

    preprocess(plan_of(tmp_path, new, overwrite=True), ByteTokenizer())
    assert open_corpus(f"{tmp_path}/c_text_document").tokens.tolist() == list(b"new")


def test_a_dead_worker_ends_the_run_and_nothing_is_left(tmp_path: Path) -> None:
    inputs = [write_lines(tmp_path / f"{n}.jsonl", ["x" * 100_000]) for n in range(20)]

    def kill_all_workers(*count: int) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(MachineError, match="worker process died"):
        preprocess(plan_of(tmp_path, *inputs, workers=2), ByteTokenizer(), kill_all_workers)
    assert files(tmp_path) == {path.name for path in inputs}


def test_a_plan_without_workers_or_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--workers is 0"):
        plan_of(tmp_path, workers=0)
    with pytest.raises(ConfigError, match="--json-keys names a key twice"):
        plan_of(tmp_path, json_keys=("text", "text"))
