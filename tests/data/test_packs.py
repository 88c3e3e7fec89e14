import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_mlr1.data.chat_encode import TARGET
from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.pack_files import PackWriter, loss_path
from megatron_mlr1.data.packs import PackSource
from megatron_mlr1.data.provenance import CorpusRecord, FileRecord, verify
from megatron_mlr1.data.rows import Rows
from megatron_mlr1.errors import ConfigError, DataError

LENGTHS = [[3, 4, 1], [8], [2, 2], [5, 3]]
"""Tokens of the chats of each pack; a pack has 8."""


def record(files: Mapping[str, FileRecord]) -> CorpusRecord:
    return CorpusRecord(
        kind="packs",
        files=files,
        tokenizer={},
        append_eod=False,
        vocab_size=100,
        dtype="uint16",
        documents=len(LENGTHS),
        sequences=sum(map(len, LENGTHS)),
        tokens=sum(map(sum, LENGTHS)),
        pack_length=8,
        trained_tokens=1,
    )


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Packs whose tokens count up, of which those that divide by three are targets."""
    made = str(tmp_path / "x_chat_document")
    writer = PackWriter(made, np.dtype("<u2"), overwrite=False)
    first = 1
    for pack in LENGTHS:
        words = np.arange(first, first + sum(pack), dtype=np.uint32)
        words[words % 3 == 0] |= TARGET
        writer.write(words, np.array(pack, np.int32), np.array([len(pack)], np.int32))
        first += sum(pack)
    writer.publish(record)
    return made


def test_a_pack_becomes_a_row(prefix: str) -> None:
    source = PackSource(prefix, 8)
    assert (source.num_items, source.keeps_documents_apart) == (4, True)
    rows = Rows(1, 8)
    (row,) = rows.each
    source.read(0, 0, row)
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # Labels 3 and 6 count; 4 begins a chat, so it is nobody's label.
    assert row.labels[row.loss_mask == 1].tolist() == [3, 6]
    assert np.flatnonzero(row.loss_mask).tolist() == [1, 4]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert row.bounds[:4].tolist() == [0, 3, 7, 8]
    assert row.longest.tolist() == [4]


def test_padding_is_a_document_of_its_own_without_a_target(prefix: str) -> None:
    (row,) = Rows(1, 11).each
    source = PackSource(prefix, 11)
    for item, ends in ((2, [2, 4, 11]), (1, [8, 11])):
        source.read(3, item, row)
        number = len(ends)
        assert row.bounds[: number + 1].tolist() == [0, *ends]
        assert (row.bounds[number:] == 11).all()
        assert not row.loss_mask[ends[-2] - 1 :].any()
        assert row.tokens[ends[-2] :].tolist() == [row.tokens[ends[-2] - 1]] * (11 - ends[-2])
        assert row.position_ids[ends[-2] :].tolist() == list(range(11 - ends[-2]))


def test_every_target_but_the_first_token_of_a_chat_is_a_label_once(prefix: str) -> None:
    corpus = open_corpus(prefix)
    source = PackSource(prefix, 8)
    (row,) = Rows(1, 8).each
    found: list[int] = []
    for item in range(source.num_items):
        source.read(0, item, row)
        assert row.labels[:-1][row.loss_mask[:-1] == 1].size == row.loss_mask.sum()
        found += row.labels[row.loss_mask == 1].tolist()
    firsts = (corpus.begins // 2 + 1).tolist()
    assert found == [n for n in range(1, 29) if n % 3 == 0 and n not in firsts]


def test_rows_shorter_than_the_packs_are_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match="packs of 8 tokens, and --seq-length is 7"):
        PackSource(prefix, 7)


def test_a_corpus_without_its_record_or_of_documents_is_refused(prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    with pytest.raises(DataError, match="does not say that these are packs"):
        PackSource(prefix, 8)


def cut_loss(prefix: str) -> None:
    path = loss_path(prefix)
    path.write_bytes(path.read_bytes()[:-1])


def no_loss(prefix: str) -> None:
    loss_path(prefix).unlink()


def cut_tokens(prefix: str) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])


def cut_index(prefix: str) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [cut_loss, no_loss, cut_tokens, cut_index])
def test_a_damaged_file_is_refused_when_opened(prefix: str, damage: Callable[[str], None]) -> None:
    damage(prefix)
    with pytest.raises(DataError, match=r"x_chat_document\.(loss\.bin|bin|idx)"):
        PackSource(prefix, 8)


@pytest.mark.parametrize("end", ["bin", "loss.bin", "idx"])
def test_a_file_that_is_cut_while_it_is_read_is_named(prefix: str, end: str) -> None:
    source = PackSource(prefix, 8)
    path = Path(f"{prefix}.{end}")
    with path.open("r+b") as file:
        file.truncate(1)
    with pytest.raises(DataError, match=f"{end} ends at byte"):
        source.read(0, 3, Rows(1, 8).each[0])


def test_an_index_of_longer_packs_is_refused_when_read(prefix: str, tmp_path: Path) -> None:
    other = str(tmp_path / "y_chat_document")
    writer = PackWriter(other, np.dtype("<u2"), overwrite=False)
    writer.write(np.ones(28, np.uint32), np.full(28, 1, np.int32), np.array([28], np.int32))
    writer.publish(record)
    with pytest.raises(DataError, match="pack 0 has 28 tokens in 28 chats, and a row has 8"):
        PackSource(other, 8).read(0, 0, Rows(1, 8).each[0])
    shutil.copy(f"{prefix}.idx", f"{other}.idx")
    broken = PackSource(other, 8)
    with Path(f"{other}.idx").open("r+b") as file:
        file.seek(-16, 2)
        file.write(b"\xff" * 8)
    with pytest.raises(DataError, match="pack 2 has the chats 4 to -1 of 8"):
        broken.read(0, 2, Rows(1, 8).each[0])


def test_the_record_knows_the_bytes_of_every_file(prefix: str) -> None:
    from megatron_mlr1.data.provenance import read_record

    kept = read_record(prefix)
    assert kept is not None
    assert set(kept.files) == {"bin", "idx", "loss.bin"}
    verify(prefix, kept, "full")
    data = bytearray(loss_path(prefix).read_bytes())
    data[0] ^= 1
    loss_path(prefix).write_bytes(data)
    with pytest.raises(DataError, match=r"loss\.bin has other bytes"):
        verify(prefix, kept, "quick")
