from pathlib import Path
from typing import Any

import pytest

from megatron_mlr1.data.jobs import PreprocessPlan
from megatron_mlr1.data.manifest import DEFAULT_SEED, ManifestRun, read_manifest
from megatron_mlr1.errors import ConfigError

TWO = """\
defaults:
  tokenizer: {type: HuggingFaceTokenizer, model: llama3}
  append_eod: true
corpora:
  wiki:
    inputs: wiki/*.jsonl
  code:
    inputs: [a.parquet, 'hf://org/code']
    json_keys: content
    tokenizer: {type: ByteLevelTokenizer}
    append_eod: false
    shuffle: 7
    on_error: skip
"""


def read(folder: Path, text: str, **choices: Any) -> dict[str, PreprocessPlan]:
    path = folder / "m.yaml"
    path.write_text(text)
    return read_manifest(ManifestRun(path=path, output_root=Path("out"), workers=3, **choices))


def test_defaults_hold_where_a_corpus_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "llama3").mkdir()
    plans = read(tmp_path, TWO)
    assert list(plans) == ["wiki", "code"]
    wiki, code = plans.values()
    assert wiki.inputs == (f"{tmp_path}/wiki/*.jsonl",)
    assert (wiki.shuffle_seed, wiki.encode.append_eod, wiki.encode.workers) == (
        DEFAULT_SEED,
        True,
        3,
    )
    assert wiki.encode.tokenizer.tokenizer_model == f"{tmp_path}/llama3"
    assert code.inputs == (f"{tmp_path}/a.parquet", "hf://org/code")
    assert (code.shuffle_seed, code.encode.append_eod, code.encode.skip_bad) == (7, False, True)
    assert code.encode.tokenizer.tokenizer_type == "ByteLevelTokenizer"


def test_each_corpus_gets_the_name_that_training_looks_for(tmp_path: Path) -> None:
    plans = read(tmp_path, TWO)
    assert plans["code"].corpus_prefix("content") == "out/code_text_document"
    shard = read(tmp_path, TWO, shard=(3, 16))["wiki"]
    assert shard.corpus_prefix("text") == "out/wiki-00003-of-00016_text_document"


def test_a_list_with_names_is_the_same_as_a_mapping(tmp_path: Path) -> None:
    text = TWO.replace("  wiki:\n", "  - name: wiki\n").replace("  code:\n", "  - name: code\n")
    assert read(tmp_path, text) == read(tmp_path, TWO)


def test_only_some_may_be_chosen(tmp_path: Path) -> None:
    assert list(read(tmp_path, TWO, only=("code",))) == ["code"]
    with pytest.raises(ConfigError, match="cod"):
        read(tmp_path, TWO, only=("cod",))


@pytest.mark.parametrize(("word", "seed"), [("false", None), ("true", 0), ("0", 0), ("12", 12)])
def test_shuffling_is_on_unless_it_is_turned_off(
    word: str, seed: int | None, tmp_path: Path
) -> None:
    plans = read(tmp_path, TWO.replace("shuffle: 7", f"shuffle: {word}"))
    assert plans["code"].shuffle_seed == seed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("append_eod: true", "append_eof: true", r"m\.yaml:3 .*append_eo[fd]"),
        ("inputs: wiki/*.jsonl", "input: x", r"m\.yaml:6 .*inputs"),
        ("inputs: wiki/*.jsonl", "json_keys: x", r"m\.yaml:6: the corpus wiki has no inputs"),
        ("on_error: skip", "on_error: ignore", r"m\.yaml:13: on_error: 'ignore' must be stop or"),
        ("shuffle: 7", "shuffle: often", r"m\.yaml:12: shuffle: 'often' must be a seed, or false"),
        ("shuffle: 7", "shuffle: -1", r"seed of the shuffle is -1"),
        ("append_eod: false", "append_eod: 1", r"m\.yaml:11: append_eod: 1 must be true or false"),
        ("json_keys: content", "json_keys: [a, a]", r"names a key twice"),
        ("model: llama3", "modle: llama3", r"m\.yaml:2 .*model"),
        ("type: ByteLevelTokenizer", "type: 3", r"m\.yaml:10: type is 3"),
        ("  wiki:", "  ../wiki:", r"m\.yaml:5: .*plain file name"),
        ("corpora:", "corpuses:", r"corpora"),
        ("  code:", "  wiki:", r"m\.yaml:7: not YAML: found duplicate key"),
        (TWO, "- a", r"m\.yaml:1: .*defaults: \.\.\."),
        (TWO, "corpora: 3", r"m\.yaml:1: no corpora"),
        (TWO, "corpora: [{inputs: a}]", r"m\.yaml:1: the name of a corpus is None"),
        (TWO, "corpora: {a: {inputs: b}}", r"tokenizer is missing"),
    ],
)
def test_what_a_manifest_may_not_say_is_refused_with_its_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in TWO
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read(tmp_path, TWO.replace(old, new))


def test_a_name_that_stands_twice_in_a_list_is_refused(tmp_path: Path) -> None:
    row = "{name: a, inputs: b, tokenizer: {type: ByteLevelTokenizer}}"
    with pytest.raises(ConfigError, match="a stands there twice"):
        read(tmp_path, f"corpora:\n  - {row}\n  - {row}\n")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = ManifestRun(path=tmp_path / "none.yaml", output_root=tmp_path, workers=1)
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read_manifest(run)
