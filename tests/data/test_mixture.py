"""A mixture's names become pairs of files, or one error that names all that is wrong."""

from pathlib import Path

import pytest

from megatron_mlr1.data.mixture import data_path_words, resolve
from megatron_mlr1.errors import DataError
from megatron_mlr1.recipes import Corpus, Mixture


def mixture(**weights: float) -> Mixture:
    corpora = (
        Corpus(name=name, weight=weight, dataset=f"{name} of the press", source="test")
        for name, weight in weights.items()
    )
    return Mixture(name="trial", about="", corpora=tuple(corpora))


def write_pair(prefix: Path, num_bytes: int = 8) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(b"\0" * num_bytes)
    prefix.with_name(f"{prefix.name}.idx").write_bytes(b"index")
    return prefix


def test_a_corpus_is_one_pair_of_files(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "wiki_text_document")
    (corpus,) = resolve(mixture(wiki=0.25), tmp_path)
    assert (corpus.name, corpus.weight, corpus.prefix) == ("wiki", 0.25, prefix)


def test_a_corpus_may_be_one_pair_of_packed_chats(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "tulu_chat_document")
    (corpus,) = resolve(mixture(tulu=1), tmp_path)
    assert corpus.prefix == prefix


def test_the_pairs_of_a_folder_share_the_weight_by_their_bytes(tmp_path: Path) -> None:
    first = write_pair(tmp_path / "arxiv" / "v1.0_text_document", 100)
    second = write_pair(tmp_path / "arxiv" / "v1.1_content_document", 300)
    write_pair(tmp_path / "arxiv" / "v1.2_text_document", 0)
    found = resolve(mixture(arxiv=0.8), tmp_path)
    assert [(c.name, c.weight, c.prefix) for c in found] == [
        ("arxiv", pytest.approx(0.2), first),
        ("arxiv", pytest.approx(0.6), second),
    ]


def test_the_order_is_the_mixtures_and_a_weight_of_zero_needs_no_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path / f"{name}_text_document")
    found = resolve(mixture(b=1, nowhere=0, a=2), tmp_path)
    assert [c.name for c in found] == ["b", "a"]


def test_the_engines_flag_has_weights_and_prefixes_in_turn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pair(tmp_path / f"{name}_text_document")
    assert data_path_words(resolve(mixture(a=0.1066, b=1), tmp_path)) == (
        *("--data-path", "0.1066", f"{tmp_path}/a_text_document"),
        *("1.0", f"{tmp_path}/b_text_document"),
    )


def test_every_missing_corpus_is_named_with_what_was_tried_and_how_to_make_it(
    tmp_path: Path,
) -> None:
    write_pair(tmp_path / "wiki_text_document")
    with pytest.raises(DataError) as caught:
        resolve(mixture(wiki=1, arxiv=1, stack=1), tmp_path)
    message = str(caught.value)
    assert "2 cannot be read" in message
    for name in ("arxiv", "stack"):
        assert f"{name} ({name} of the press)" in message
        assert f"{tmp_path}/{name}_text_document.bin" in message
        assert f"{tmp_path}/{name}/*_document.bin" in message
    assert "python tools/preprocess_data.py --input FILE.jsonl" in message
    assert f"--output-prefix {tmp_path}/NAME" in message


@pytest.mark.parametrize("lost", ["bin", "idx"])
@pytest.mark.parametrize("prefix", ["wiki_text_document", "wiki/part_text_document"])
def test_half_a_pair_is_named(prefix: str, lost: str, tmp_path: Path) -> None:
    gone = write_pair(tmp_path / prefix).with_suffix(f".{lost}")
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone} is missing beside its other half"):
        resolve(mixture(wiki=1), tmp_path)


@pytest.mark.parametrize("other", ["wiki/part_text_document", "wiki_chat_document"])
def test_two_homes_for_one_corpus_are_refused(tmp_path: Path, other: str) -> None:
    write_pair(tmp_path / "wiki_text_document")
    write_pair(tmp_path / other)
    with pytest.raises(DataError, match="only one may be the corpus"):
        resolve(mixture(wiki=1), tmp_path)


def test_a_corpus_without_a_token_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "wiki_text_document", 0)
    with pytest.raises(DataError, match="holds no token"):
        resolve(mixture(wiki=1), tmp_path)
