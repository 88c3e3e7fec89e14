"""A damaged corpus to a new one of all that can be trusted; the damaged one is left as it is."""

from dataclasses import dataclass, replace

import numpy as np

from megatron_mlr1.data.check import check
from megatron_mlr1.data.index import HEADER, bin_path, idx_path
from megatron_mlr1.data.provenance import (
    read_record,
    record_files,
    refuse_packs,
    write_record,
)
from megatron_mlr1.data.runs import (
    DocumentRun,
    OnProgress,
    Place,
    WrittenCorpus,
    whole_run,
    write_corpora,
)
from megatron_mlr1.data.stored_index import (
    StoredIndex,
    count_tokens,
    read_counts,
    refuse_wrong_documents,
)
from megatron_mlr1.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairPlan:
    """What to mend, and what may be given up for it."""

    input_prefix: str
    output_prefix: str
    truncate: bool = False
    """Where tokens and index end at different places: leave out what only one of them has."""
    sequences_as_documents: bool = False
    """Make each sequence a document; what the index says of documents is not read."""
    overwrite: bool = False
    """Replace a corpus that is there."""


def repair(
    plan: RepairPlan, on_progress: OnProgress = lambda num_bytes: None
) -> tuple[WrittenCorpus, int]:
    """Write what is sound of a corpus to a new one, and give the number of documents left out.

    The lengths of the sequences are the truth. Mended are: where sequences begin; the number of
    documents in the header; with the plan's leave, the borders of the documents and a file of
    tokens that is too short (its last documents are left out) or too long.

    Raises:
        ConfigError: the corpus has no fault, or the new one is there or is the old one.
        DataError: the lengths are damaged, or mending would give up what the plan keeps.
        MachineError: a folder is missing, or the disk is full or failed.
    """
    record = read_record(plan.input_prefix)
    refuse_packs(plan.input_prefix, record, "tools/repair_data.py")
    _refuse_sound(plan)
    index = _open_damaged(plan)
    num_tokens = count_tokens(index)
    try:
        refuse_wrong_documents(index)
    except DataError as error:
        raise DataError(
            f"{error} Only --sequences-as-documents can: it makes each sequence a document, which "
            "is what they are unless the texts were lists."
        ) from error
    run = whole_run(index, num_tokens)
    if num_tokens * index.dtype.itemsize != index.bin_bytes:
        if not plan.truncate:
            raise DataError(
                f"{bin_path(index.prefix)} has {index.bin_bytes} bytes where its index makes "
                f"{num_tokens * index.dtype.itemsize}. With --truncate the documents that are not "
                "whole, or the bytes that belong to none, are left out."
            )
        run = _whole_documents(index)
    if not run.num_tokens:
        raise DataError(f"{index.prefix} has no whole document with tokens. Make it again.")
    [written] = write_corpora(
        {plan.output_prefix: [run]}, overwrite=plan.overwrite, on_progress=on_progress
    )
    if record is not None:
        mended = replace(
            record,
            files=record_files(plan.output_prefix),
            documents=written.num_documents,
            sequences=written.num_sequences,
            tokens=written.num_tokens,
            plan=None,
            tail_fraction=None,
        )
        write_record(plan.output_prefix, mended)
    return written, index.num_documents - written.num_documents


def _refuse_sound(plan: RepairPlan) -> None:
    try:
        check(plan.input_prefix)
    except DataError:
        return
    raise ConfigError(f"{plan.input_prefix} has no fault, so nothing was written. Use it as it is.")


def _open_damaged(plan: RepairPlan) -> StoredIndex:
    index, size = read_counts(plan.input_prefix)
    lengths_bytes = HEADER.size + 4 * index.num_sequences
    if plan.sequences_as_documents and size >= lengths_bytes:
        return replace(index, num_documents=index.num_sequences, documents_are_sequences=True)
    documents_bytes = size - HEADER.size - 12 * index.num_sequences
    if documents_bytes < 8 or documents_bytes % 8:
        hint = (
            "only --sequences-as-documents can mend it"
            if size >= lengths_bytes
            else ("lengths are lost, so make it again with tools/preprocess_data.py")
        )
        raise DataError(
            f"{idx_path(plan.input_prefix)} has {size} bytes, which end within a number or before "
            f"the documents of {index.num_sequences} sequences: {hint}."
        )
    return replace(index, num_documents=documents_bytes // 8 - 1)


def _whole_documents(index: StoredIndex) -> DocumentRun:
    """Take the documents whose tokens all lie in the file."""
    present = index.bin_bytes // index.dtype.itemsize
    end = Place(0, 0, 0)
    for ends, tokens in index.totals():
        count = int(np.searchsorted(tokens, present, side="right"))
        if count:
            end = Place(end.documents + count, int(ends[count - 1]), int(tokens[count - 1]))
        if count < tokens.size:
            break
    return DocumentRun(index, Place(0, 0, 0), end)
