import hashlib
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mlr1.data import shuffle as module
from megatron_mlr1.data.check import check
from megatron_mlr1.data.index import DocumentBlock, IndexWriter, open_corpus
from megatron_mlr1.data.provenance import read_record, verify
from megatron_mlr1.data.shuffle import TAIL_BEGIN, ShufflePlan, places, shuffle
from megatron_mlr1.errors import ConfigError, DataError, MachineError
from tests.support.corpora import contents, names, write_random_corpus
from tests.support.records import write_record_of

Document = tuple[bytes, ...]


def documents(prefix: Path) -> list[Document]:
    """Read the documents of a corpus: the bytes of each sequence."""
    corpus = open_corpus(str(prefix))
    ends = np.cumsum(corpus.lengths)
    tokens = [part.tobytes() for part in np.split(corpus.tokens, ends[:-1])]
    bounds = corpus.document_ends.tolist()
    return [tuple(tokens[a:b]) for a, b in pairwise(bounds)]


def content_hash(document: Document) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(document), digest_size=8).digest(), "big")


def shuffled(folder: Path, seed: int, name: str = "out") -> list[Document]:
    shuffle(ShufflePlan(input_prefix=f"{folder}/a", output_prefix=f"{folder}/{name}", seed=seed))
    return documents(folder / name)


def by_definition(source: list[Document], seed: int) -> list[Document]:
    keys = places(seed, 0, len(source)).tolist()
    hashes = [content_hash(document) for document in source]
    order = sorted(
        range(len(source)),
        key=lambda n: (True, hashes[n], n) if hashes[n] >= TAIL_BEGIN else (False, keys[n], n),
    )
    return [source[number] for number in order]


def write_lengths(prefix: Path, lengths: Any) -> None:
    lengths = np.asarray(lengths)
    tokens = np.random.default_rng(0).integers(0, 60_000, lengths.sum())
    writer = IndexWriter(str(prefix), np.dtype("<u2"))
    writer.write(DocumentBlock(tokens, lengths, np.ones(lengths.size, np.int64)))
    writer.seal()
    writer.publish()


def test_documents_stand_as_the_definition_says(tmp_path: Path) -> None:
    write_random_corpus(tmp_path / "a", 30_000, seed=1)
    source = documents(tmp_path / "a")
    found = shuffled(tmp_path, 5)
    assert found == by_definition(source, 5)
    assert Counter(found) == Counter(source)
    assert found != source
    check(f"{tmp_path}/out")
    assert names(tmp_path) == ["a.bin", "a.idx", "out.bin", "out.idx"]


def test_the_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", np.arange(1000) % 7)
    one, again, other = (
        shuffled(tmp_path, seed, name) for seed, name in ((1, "x"), (1, "y"), (2, "z"))
    )
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert one == again != other


def test_many_small_buckets_and_large_documents_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lengths(tmp_path / "a", [3, 4000, 0, 700, *([40] * 2000), 9000])
    whole = shuffled(tmp_path, 3, "whole")
    monkeypatch.setattr(module, "BUCKET_BYTES", 1 << 14)
    monkeypatch.setattr(module, "BUFFERS_BYTES", 1 << 10)
    monkeypatch.setattr(module, "GROUP_BYTES", 1 << 10)
    assert shuffled(tmp_path, 3, "small") == whole
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


def test_the_last_documents_are_those_of_highest_content_hash(tmp_path: Path) -> None:
    # Every document stands there twice, far apart.
    write_lengths(tmp_path / "half", [3] * 10_000)
    half = documents(tmp_path / "half")
    tokens = np.frombuffer(b"".join(document[0] for document in half * 2), "<u2")
    writer = IndexWriter(f"{tmp_path}/a", np.dtype("<u2"))
    writer.write(DocumentBlock(tokens, np.full(20_000, 3), np.ones(20_000, np.int64)))
    writer.seal()
    writer.publish()
    hashes = sorted(map(content_hash, half * 2))
    tails = []
    for seed in (1, 2):
        found = [content_hash(document) for document in shuffled(tmp_path, seed, f"s{seed}")]
        for percent in (0.1, 1, 3):
            last = int(len(found) * percent / 100)
            assert found[-last:] == hashes[-last:]
        body = [value for value in found if value < TAIL_BEGIN]
        assert found[: len(body)] == body
        tails.append(found[len(body) :])
    assert tails[0] == tails[1] == [value for value in hashes if value >= TAIL_BEGIN]


def test_every_place_is_as_likely_as_any_other() -> None:
    # Documents 0, 1000, ... of 20,000 over many seeds: chi-square over 20 stretches of places has
    # 19 degrees of freedom, so it exceeds 43.8 in 0.1 % of all cases.
    counts = np.zeros((20, 20))
    for seed in range(2000):
        order = places(seed, 0, 20_000)
        ranks = (order[::1000] >> np.uint64(32)) * np.uint64(20) >> np.uint64(32)
        counts[np.arange(20), ranks.astype(int)] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum(axis=1)
    assert (chi_square < 43.8).sum() >= 19
    # Neighbours know nothing of each other.
    keys = places(0, 0, 1_000_000) / 2.0**64
    assert abs(np.corrcoef(keys[:-1], keys[1:])[0, 1]) < 4e-3
    assert np.unique(places(0, 0, 1_000_000)).size == 1_000_000


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [1])
    write_lengths(tmp_path / "b", [50_000_000 // 2000] * 8000)
    program = (
        "import sys; from pathlib import Path\n"
        "from megatron_mlr1.data.shuffle import ShufflePlan, shuffle\n"
        "shuffle(ShufflePlan(input_prefix=sys.argv[1], output_prefix=sys.argv[1] + 'x', seed=1))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for name in "ab":
        words = [sys.executable, "-c", program, f"{tmp_path}/{name}"]
        run = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout) * 1024)
    assert (tmp_path / "b.bin").stat().st_size == 400_000_000
    assert peaks[1] < 400e6


def test_a_record_says_how_the_new_order_came_about(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [3] * 100)
    write_record_of(f"{tmp_path}/a")
    shuffled(tmp_path, 9)
    record = read_record(f"{tmp_path}/out")
    assert record is not None
    assert (record.shuffled, record.tail_fraction, record.documents) == (9, 1 / 32, 100)
    verify(f"{tmp_path}/out", record, "full")


def test_what_cannot_be_shuffled_is_refused(tmp_path: Path) -> None:
    write_lengths(tmp_path / "a", [3] * 100)
    with pytest.raises(ConfigError, match="never changed in place"):
        shuffle(
            ShufflePlan(
                input_prefix=f"{tmp_path}/a", output_prefix=f"{tmp_path}/a", seed=1, overwrite=True
            )
        )
    with pytest.raises(ConfigError, match="seed of the shuffle is -1"):
        ShufflePlan(input_prefix="a", output_prefix="b", seed=-1)
    shuffled(tmp_path, 1)
    with pytest.raises(ConfigError, match="--overwrite"):
        shuffled(tmp_path, 2)
    write_record_of(f"{tmp_path}/a", kind="packs")
    with pytest.raises(ConfigError, match="packed samples"):
        shuffled(tmp_path, 1, "packs")
    with pytest.raises(DataError, match=r"missing\.bin: No such file"):
        shuffle(ShufflePlan(input_prefix=f"{tmp_path}/missing", output_prefix="b", seed=1))
    with pytest.raises(MachineError, match="missing"):
        shuffle(
            ShufflePlan(
                input_prefix=f"{tmp_path}/out", output_prefix=f"{tmp_path}/missing/b", seed=1
            )
        )
