"""Records of corpora that no tokenizer made."""

from typing import Any

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.provenance import CorpusRecord, record_files, write_record


def write_record_of(prefix: str, **fields: Any) -> CorpusRecord:
    """Write a record that fits the files of a corpus; `fields` say something else."""
    corpus = open_corpus(prefix)
    known: dict[str, Any] = {
        "kind": "documents",
        "files": record_files(prefix),
        "tokenizer": {"type": "ByteLevelTokenizer", "sha256": None, "eod": 0},
        "append_eod": False,
        "vocab_size": 60_000,
        "dtype": corpus.tokens.dtype.name,
        "documents": corpus.num_documents,
        "sequences": corpus.lengths.size,
        "tokens": corpus.num_tokens,
        "inputs": [{"path": f"{prefix}.jsonl"}],
    }
    record = CorpusRecord(**(known | fields))
    write_record(prefix, record)
    return record
