"""Several corpora to one, in constant memory."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mlr1.data.disk import names_the_file
from megatron_mlr1.data.index import bin_path, idx_path
from megatron_mlr1.data.provenance import (
    CorpusRecord,
    decides_ids,
    read_record,
    record_files,
    refuse_packs,
    write_record,
)
from megatron_mlr1.data.runs import OnProgress, WrittenCorpus, whole_run, write_corpora
from megatron_mlr1.data.stored_index import (
    StoredIndex,
    count_tokens,
    open_index,
    refuse_wrong_documents,
    refuse_wrong_size,
)
from megatron_mlr1.errors import ConfigError, DataError


def find_corpora(inputs: Iterable[str]) -> list[str]:
    """List the prefixes of corpora; a folder stands for all corpora in it, sorted by name.

    Raises:
        ConfigError: a corpus is given twice, or an input may be a folder or a corpus.
        DataError: nothing is there, half a corpus is missing, or one is not finished.
    """
    prefixes: list[str] = []
    for given in inputs:
        if not given:
            raise ConfigError(
                "An input is '', which names nothing. Name a folder, or a path without .bin and "
                ".idx; for this folder say ./ instead."
            )
        with names_the_file(Path(given), DataError):
            is_corpus = bin_path(given).exists() or idx_path(given).exists()
            is_folder = Path(given).is_dir()
        if is_corpus and is_folder and not given.endswith("/"):
            raise ConfigError(
                f"{given} is a folder, and beside it lie files of a corpus of that name. "
                f"Say {given}/ for the folder, or give the corpus another name."
            )
        prefixes += _in_folder(Path(given)) if is_folder else [given]
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                what = "is no file" if os.path.lexists(path) else "is not there"
                raise DataError(
                    f"{path} {what}. An input is a folder, or a path without .bin and .idx "
                    "that has both files; give that, or make the corpus again."
                )
    _refuse_twice(prefixes)
    return prefixes


def _in_folder(folder: Path) -> list[str]:
    with names_the_file(folder, DataError):
        names = sorted(path.name for path in folder.iterdir())
    marks = (".partial", ".journal.json", ".unshuffled.bin", ".unshuffled.idx")
    unfinished = [name for name in names if name.endswith(marks)]
    if unfinished:
        raise DataError(
            f"{folder / unfinished[0]} is not finished: its run goes on or was killed. Let it "
            "end, give its command again, or remove the file."
        )
    stems = sorted({name[:-4] for name in names if name.endswith((".bin", ".idx"))})
    if not stems:
        raise DataError(f"{folder} holds no corpus: no .bin and .idx files. Name another folder.")
    return [str(folder / stem) for stem in stems]


def _refuse_twice(prefixes: Sequence[str]) -> None:
    seen: dict[Path, str] = {}
    for prefix in prefixes:
        path = bin_path(prefix).resolve()
        if path in seen:
            raise ConfigError(
                f"{prefix} and {seen[path]} are the same corpus. Give it once; a mixture's "
                "weights make training see it more often."
            )
        seen[path] = prefix


def merge(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda num_bytes: None,
) -> WrittenCorpus:
    """Join corpora to `{output_prefix}.bin` and `.idx`, in the order given.

    The bytes are those of Megatron-LM's `tools/merge_datasets.py` (core 0.19), which sorts by name.
    Where sequences begin is computed anew, so corpora of which only that is wrong come out right.

    Args:
        prefixes: at least one, as `find_corpora` gives them.
        output_prefix: where the new corpus goes.
        overwrite: replace a corpus that is there.
        on_progress: called with the bytes of tokens written since the last call.

    Raises:
        ConfigError: an input is the output, or the output is there.
        DataError: an input is damaged, the token types differ, or no input holds a token.
        MachineError: a folder is missing, or the disk is full or failed.
    """
    indices = [open_index(prefix) for prefix in prefixes]
    _refuse_other_types(indices)
    records = [read_record(prefix) for prefix in prefixes]
    _refuse_other_makers(prefixes, records)
    runs = []
    for index in indices:
        num_tokens = count_tokens(index)
        refuse_wrong_size(index, num_tokens)
        refuse_wrong_documents(index)
        runs.append(whole_run(index, num_tokens))
    if not any(run.num_tokens for run in runs):
        raise DataError(
            f"{prefixes[0]} and all other inputs hold no tokens, and training cannot open an "
            "empty corpus. Name others."
        )
    [written] = write_corpora({output_prefix: runs}, overwrite=overwrite, on_progress=on_progress)
    known = [record for record in records if record is not None]
    if len(known) == len(records):
        write_record(output_prefix, _joined(known, written))
    return written


def _joined(records: Sequence[CorpusRecord], written: WrittenCorpus) -> CorpusRecord:
    """Make the record of several corpora that were joined; one alone keeps what it says."""
    files = record_files(written.prefix)
    if len(records) == 1:
        return replace(records[0], files=files)
    extras = [record.extra for record in records]
    return replace(
        records[0],
        files=files,
        vocab_size=max(record.vocab_size for record in records),
        documents=written.num_documents,
        sequences=written.num_sequences,
        tokens=written.num_tokens,
        rejected=sum(record.rejected for record in records),
        inputs=[fingerprint for record in records for fingerprint in record.inputs],
        shard=None,
        plan=None,
        shuffled=None,
        tail_fraction=None,
        part_of=None,
        extra=extras[0] if all(extra == extras[0] for extra in extras) else None,
    )


def _refuse_other_makers(prefixes: Sequence[str], records: Sequence[CorpusRecord | None]) -> None:
    """Refuse corpora that different tokenizers made, as far as records tell."""
    first: tuple[str, CorpusRecord] | None = None
    for prefix, record in zip(prefixes, records, strict=True):
        refuse_packs(prefix, record, "tools/merge_data.py")
        if record is None:
            continue
        first = first or (prefix, record)
        for what, own, others in (
            ("tokenizer", decides_ids(record.tokenizer), decides_ids(first[1].tokenizer)),
            ("--append-eod", record.append_eod, first[1].append_eod),
        ):
            if own != others:
                raise DataError(
                    f"{prefix} was made with another {what} ({own}) than {first[0]} ({others}), "
                    "and one corpus has one. Make one of them again."
                )


def _refuse_other_types(indices: Sequence[StoredIndex]) -> None:
    first = indices[0]
    for index in indices[1:]:
        if index.dtype != first.dtype:
            raise DataError(
                f"{index.prefix} holds {index.dtype.name} and {first.prefix} {first.dtype.name}; "
                "one corpus has one token type, which follows from the vocabulary. Make one of "
                "them again with tools/preprocess_data.py and the same tokenizer and --vocab-size."
            )
