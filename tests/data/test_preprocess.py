import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.encode import EncodePlan
from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.jobs import PreprocessPlan, finished, prepare
from megatron_mlr1.data.journal import Stop, StoppedError, only_run
from megatron_mlr1.data.merge import merge
from megatron_mlr1.data.preprocess import Progress, preprocess
from megatron_mlr1.data.provenance import read_record, verify
from megatron_mlr1.data.shuffle import ShufflePlan, shuffle
from megatron_mlr1.data.tokenizers import TokenizerPlan
from megatron_mlr1.errors import ConfigError, DataError, MachineError
from tests.support.corpora import contents

BYTES = TokenizerPlan(tokenizer_type="ByteLevelTokenizer")
Text = str | list[str]


def write_lines(path: Path, texts: Sequence[Text]) -> Path:
    lines = [json.dumps({"text": text, "number": str(n)}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ENCODE = {
    *("tokenizer", "json_keys", "append_eod", "vocab_size", "workers", "skip_bad"),
    "few_characters",
}


def plan_of(folder: Path, *inputs: Path, **choices: Any) -> PreprocessPlan:
    encode = {"tokenizer": BYTES} | {k: v for k, v in choices.items() if k in ENCODE}
    rest = {"output_prefix": f"{folder}/c"} | {k: v for k, v in choices.items() if k not in ENCODE}
    return PreprocessPlan(inputs=tuple(map(str, inputs)), encode=EncodePlan(**encode), **rest)


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


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(
    "tokenizer_plan", ["bytes", "sentencepiece", "bpe", "bpe with begin"], indirect=True
)
def test_files_are_those_of_the_engine(
    tokenizer_plan: TokenizerPlan,
    few: bool,
    texts: list[str],
    engine_tokenizer: Callable[[TokenizerPlan], Any],
    tmp_path: Path,
) -> None:
    shards: list[Sequence[Text]] = [texts, ["a", ["b c", "", "d"], [], ["", ""]], texts[::-1]]
    inputs = [write_lines(tmp_path / f"{n}.jsonl", shard) for n, shard in enumerate(shards)]
    append_eod = few
    choices = {"few_characters": 2**18 if few else 0, "append_eod": append_eod}
    plan = plan_of(tmp_path, *inputs, tokenizer=tokenizer_plan, workers=2, **choices)

    preprocess(prepare(plan))

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

    preprocess(prepare(plan_of(tmp_path, path, workers=3, append_eod=True)))

    corpus = open_corpus(f"{tmp_path}/c_text_document")
    expected = b"".join(text.encode() + b"\x00" for text in documents)
    assert path.stat().st_size > 4 * 2**20
    assert corpus.tokens.astype("u1").tobytes() == expected
    assert corpus.document_ends.tolist() == list(range(len(documents) + 1))


def test_each_key_becomes_a_corpus_and_progress_counts_all_input(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{n}.jsonl", ["ab", "", "cde"]) for n in range(2)]
    told: list[Progress] = []
    job = prepare(plan_of(tmp_path, *paths, json_keys=("text", "number")))

    summaries = preprocess(job, told.append)

    assert [(s.prefix, s.num_documents, s.num_tokens, s.dtype.name) for s in summaries] == [
        (f"{tmp_path}/c_text_document", 6, 10, "uint16"),
        (f"{tmp_path}/c_number_document", 6, 6, "uint16"),
    ]
    assert (told[-1].documents, told[-1].tokens) == (6, 16)
    total = sum(path.stat().st_size for path in paths)
    assert (told[0].done_bytes, told[-1].done_bytes, told[-1].total_bytes) == (0, total, total)


def test_the_record_says_what_made_the_corpus_and_fits_its_files(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", ["ab", "", "cde"])
    job = prepare(plan_of(tmp_path, path, append_eod=True))
    assert finished(job) is None
    preprocess(job)

    record = read_record(f"{tmp_path}/c_text_document")
    assert record is not None
    verify(f"{tmp_path}/c_text_document", record, "full")
    assert (record.documents, record.sequences, record.tokens) == (3, 2, 7)
    assert (record.append_eod, record.dtype, record.shuffled) == (True, "uint16", None)
    assert record.inputs[0]["path"] == str(path)
    assert record.tokenizer["type"] == "ByteLevelTokenizer"
    assert files(tmp_path) == {"in.jsonl", *(f"c_text_document.{k}" for k in KINDS)}
    summaries = finished(job)
    assert summaries is not None
    assert summaries[0].num_tokens == 7
    assert finished(prepare(plan_of(tmp_path, path))) is None


KINDS = ("bin", "idx", "meta.json")


def test_a_wrong_line_far_down_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    texts = ["x" * 1000] * 4000
    path = write_lines(tmp_path / "in.jsonl", texts)
    with path.open("a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(DataError, match=r"in\.jsonl:4001: 'text' holds a number"):
        preprocess(prepare(plan_of(tmp_path, path)))
    assert files(tmp_path) == {"in.jsonl"}


@pytest.mark.parametrize(
    ("texts", "choices", "message"),
    [
        (["abc", "", ["y", "yz"], "x"], {"vocab_size": 122}, r":3: token id 122 is outside"),
        (["abc"], {"vocab_size": 0, "append_eod": True}, "--append-eod would write id 0"),
        (["", []], {}, "'text' is empty in all 2 documents"),
        (["", []], {"journal_bytes": 1, "journal_s": 0}, "'text' is empty in all 2 documents"),
        (["a"], {"json_keys": ("text", "body")}, r":1: no key 'body'"),
    ],
)
def test_what_cannot_become_a_corpus_is_refused_and_nothing_is_left(
    texts: list[Text], choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts)
    with pytest.raises((DataError, ConfigError), match=message):
        preprocess(prepare(plan_of(tmp_path, path, **choices)))
    assert files(tmp_path) == {"in.jsonl"}


def test_an_existing_corpus_is_kept_unless_overwriting_is_wanted(tmp_path: Path) -> None:
    old, new = (write_lines(tmp_path / f"{name}.jsonl", [name]) for name in ("old", "new"))
    preprocess(prepare(plan_of(tmp_path, old)))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="--overwrite"):
        preprocess(prepare(plan_of(tmp_path, new, json_keys=("number", "text"))))
    assert open_corpus(f"{tmp_path}/c_text_document").tokens.tolist() == list(b"old")
    assert files(tmp_path) == before

    preprocess(prepare(plan_of(tmp_path, new, overwrite=True)))
    assert open_corpus(f"{tmp_path}/c_text_document").tokens.tolist() == list(b"new")
    assert files(tmp_path) == before


def test_plans_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for choices, message in (
        ({"workers": 0}, "--workers is 0"),
        ({"json_keys": ("text", "text")}, "--json-keys names a key twice"),
        ({"journal_bytes": 0}, "--journal-mb"),
        ({"shuffle_seed": -1}, "seed of the shuffle is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(tmp_path, **choices)


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Twelve inputs, each a batch of its own; every third has a bad line."""
    (tmp_path / "in").mkdir()
    paths = []
    for number in range(12):
        texts: list[Text] = [f"{number} {n} " * (n % 13) for n in range(50)]
        path = write_lines(tmp_path / "in" / f"{number:02}.jsonl", texts)
        if number % 3 == 0:
            with path.open("a") as file:
                file.write(f"bad {number}\n")
        paths.append(path)
    return paths


CHOICES: dict[str, Any] = {"skip_bad": True, "journal_bytes": 1, "json_keys": ("text", "number")}


def stop_after(job: Any, calls: int) -> None:
    """Run a job and ask it to stop at one of its reports of progress."""
    stop, told = Stop(), 0

    def count(progress: Progress) -> None:
        nonlocal told
        told += 1
        if told == calls:
            stop.ask(15, None)

    preprocess(job, count, stop)


@pytest.mark.parametrize("seed", [None, 5])
def test_stopped_again_and_again_it_ends_with_the_bytes_of_an_undisturbed_run(
    seed: int | None, many: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    job = prepare(plan_of(tmp_path, *many, shuffle_seed=seed, **CHOICES))
    whole = preprocess(job)
    stops = 0
    plan = replace(job.plan, output_prefix=f"{tmp_path}/out/c")
    while True:
        try:
            # The second report of a run is of new work, so every run gets ahead.
            stop_after(prepare(plan), 3 if seed is None or stops < 5 else 30)
        except StoppedError:
            stops += 1
            assert "c.journal.json" in files(tmp_path / "out")
            assert not any(
                name.endswith((".bin", ".rejected.jsonl")) and "unshuffled" not in name
                for name in files(tmp_path / "out")
            )
        else:
            break
    assert stops >= 5
    for summary in whole:
        name = Path(summary.prefix).name
        assert contents(tmp_path / "out" / name) == contents(tmp_path / name)
        records = [read_record(f"{folder}/{name}") for folder in (tmp_path, tmp_path / "out")]
        assert records[0] == records[1]
    rejected = [folder / "c.rejected.jsonl" for folder in (tmp_path, tmp_path / "out")]
    assert rejected[0].read_bytes() == rejected[1].read_bytes()
    assert len(rejected[0].read_text().splitlines()) == 4
    assert files(tmp_path / "out") == files(tmp_path) - {"in", "out"}


def test_records_in_are_documents_out_and_rejected_ones(many: list[Path], tmp_path: Path) -> None:
    [text, _] = preprocess(prepare(plan_of(tmp_path, *many, **CHOICES)))
    assert (text.num_documents, text.num_rejected) == (12 * 50, 4)
    lines = map(json.loads, (tmp_path / "c.rejected.jsonl").read_text().splitlines())
    assert [line["where"] for line in lines] == [f"{many[n]}:51" for n in (0, 3, 6, 9)]


def test_a_bad_record_keeps_what_was_done_for_a_run_that_skips_it(
    many: list[Path], tmp_path: Path
) -> None:
    inputs = [*(path for number, path in enumerate(many) if number % 3), many[3]]
    plan = plan_of(tmp_path, *inputs, **(CHOICES | {"skip_bad": False}))
    with pytest.raises(StoppedError):
        stop_after(prepare(plan), 4)
    with pytest.raises(DataError, match=r"03\.jsonl:51.*--on-error skip too"):
        preprocess(prepare(plan))
    assert "c.journal.json" in files(tmp_path)
    told: list[Progress] = []
    preprocess(prepare(plan_of(tmp_path, *inputs, **CHOICES)), told.append)
    assert told[0].documents >= 50
    assert told[-1].documents == 50 * len(inputs)


def test_another_command_over_a_stopped_run_is_refused_and_may_replace_it(
    many: list[Path], tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, *many, **CHOICES)
    with pytest.raises(StoppedError):
        stop_after(prepare(plan), 3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"append_eod is True where it had False.*--overwrite"):
        preprocess(prepare(plan_of(tmp_path, *many, append_eod=True, **CHOICES)))
    many[5].write_text('{"text": "new", "number": "1"}\n')
    with pytest.raises(ConfigError, match=r"input .*05\.jsonl is not what it was"):
        preprocess(prepare(plan))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    only_text = plan_of(tmp_path, many[5], overwrite=True)
    preprocess(prepare(only_text))
    assert files(tmp_path) == {"in", *(f"c_text_document.{kind}" for kind in KINDS)}


def test_two_runs_do_not_write_the_same_corpus_at_once(many: list[Path], tmp_path: Path) -> None:
    job = prepare(plan_of(tmp_path, *many, **CHOICES))
    with only_run(job.plan.prefix), pytest.raises(ConfigError, match="another run"):
        preprocess(job)


def test_a_full_disk_keeps_what_was_done(
    many: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, *many, shuffle_seed=1, **CHOICES)
    folder = tmp_path / "c_text_document.shuffle.partial"
    folder.touch()  # the folder of the buckets cannot be made
    with pytest.raises(MachineError, match=r"shuffle\.partial.*the same command goes on"):
        preprocess(prepare(plan))
    folder.unlink()
    told: list[Progress] = []
    preprocess(prepare(plan), told.append)
    assert {progress.phase for progress in told} == {"shuffle"}


def test_shards_joined_in_order_have_the_bytes_of_one_run(many: list[Path], tmp_path: Path) -> None:
    choices: dict[str, Any] = {"skip_bad": True}
    preprocess(prepare(plan_of(tmp_path, *many, **choices)))
    parts = []
    for number in range(5):
        [part] = preprocess(prepare(plan_of(tmp_path, *many, shard=(number, 5), **choices)))
        assert part.prefix == f"{tmp_path}/c-0000{number}-of-00005_text_document"
        parts.append(part.prefix)
    merge(parts, f"{tmp_path}/joined")
    assert contents(tmp_path / "joined") == contents(tmp_path / "c_text_document")
    whole, joined = (read_record(f"{tmp_path}/{n}") for n in ("c_text_document", "joined"))
    assert whole is not None
    assert joined is not None
    assert joined.files == whole.files
    assert (joined.documents, joined.tokens, joined.rejected, joined.shard) == (
        *(whole.documents, whole.tokens, whole.rejected),
        None,
    )


def test_shuffled_it_has_the_order_of_the_shuffle_of_the_corpus(
    many: list[Path], tmp_path: Path
) -> None:
    preprocess(prepare(plan_of(tmp_path, *many, skip_bad=True)))
    shuffle(
        ShufflePlan(
            input_prefix=f"{tmp_path}/c_text_document", output_prefix=f"{tmp_path}/s", seed=4
        )
    )
    other = plan_of(tmp_path, *many, skip_bad=True, shuffle_seed=4, output_prefix=f"{tmp_path}/d")
    preprocess(prepare(other))
    assert contents(tmp_path / "d_text_document") == contents(tmp_path / "s")
    records = [read_record(f"{tmp_path}/{n}") for n in ("c_text_document", "d_text_document")]
    assert [record and (record.shuffled, record.tail_fraction) for record in records] == [
        (None, None),
        (4, 1 / 32),
    ]
    lengths = [
        Counter(open_corpus(f"{tmp_path}/{name}_text_document").lengths.tolist()) for name in "cd"
    ]
    assert all(a == b for a, b in pairwise(lengths))
