"""What one run of preprocessing is to do, and all that decides the bytes of its corpora."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mlr1.data.encode import EncodePlan, describe_tokenizer
from megatron_mlr1.data.inputs import Unit, find_units, fingerprint
from megatron_mlr1.data.journal import digest_of, journal_path
from megatron_mlr1.data.provenance import CorpusRecord, decides_ids, read_record, verify
from megatron_mlr1.data.shuffle import refuse_negative
from megatron_mlr1.errors import ConfigError

OPTIONS = {
    "HuggingFaceTokenizer": ("include_special_tokens",),
    "TikTokenizer": ("tiktoken_pattern", "tiktoken_num_special_tokens", "special_tokens"),
}
"""Fields of a tokenizer's plan that decide ids beside its model, by its type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessPlan:
    """What to read and what to write."""

    inputs: tuple[str, ...]
    """As `inputs.find_units` takes them, read in this order."""
    output_prefix: str
    """Each key becomes the corpus `{output_prefix}_{key}_document`."""
    encode: EncodePlan
    output_key: str | None = None
    """Stands in the name of the corpus in place of its only key."""
    shard: tuple[int, int] | None = None
    """(i, n): the i-th of n parts; its number stands in the names of the outputs."""
    shuffle_seed: int | None = None
    """Seed of the new order of the documents; None: the order of the input."""
    overwrite: bool = False
    """Replace corpora that are there, and what a stopped run of another plan left."""
    journal_bytes: int = 256 << 20
    """Bytes of output between two journals."""
    journal_s: float = 60.0
    """Seconds between two journals where they come earlier."""

    def __post_init__(self) -> None:
        if self.encode.workers < 1:
            raise ConfigError(f"--workers is {self.encode.workers}; tokenizing needs at least 1.")
        keys = self.encode.json_keys
        if len(set(keys)) < len(keys):
            raise ConfigError(
                f"--json-keys names a key twice ({' '.join(keys)}); each is one corpus. "
                "Name it once."
            )
        assert self.output_key is None or len(keys) == 1, "one name is for one key"
        if self.journal_bytes < 1:
            raise ConfigError("--journal-mb must be above 0.")
        if self.shuffle_seed is not None:
            refuse_negative(self.shuffle_seed)

    @property
    def prefix(self) -> str:
        """Name the run: the prefix, with the shard."""
        if self.shard is None:
            return self.output_prefix
        return "{}-{:05d}-of-{:05d}".format(self.output_prefix, *self.shard)

    def corpus_prefix(self, key: str) -> str:
        """Name the corpus of one key, as Megatron-LM's tool does."""
        return f"{self.prefix}_{self.output_key or key}_document"


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What one finished corpus holds."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_rejected: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A plan with what it found: its units, its tokenizer, and all that decides the bytes."""

    plan: PreprocessPlan
    units: Sequence[Unit]
    tokenizer: Mapping[str, Any]
    decides: Mapping[str, Any]

    @property
    def total_bytes(self) -> int:
        """Bytes of the input as it is stored."""
        return sum(unit.stored_bytes for unit in self.units)


def prepare(plan: PreprocessPlan) -> Job:
    """Find the inputs and the tokenizer of a plan; writes nothing.

    Raises:
        ConfigError: an input or a flag makes no sense.
        DataError: an input or the tokenizer is missing or damaged.
    """
    units = find_units(plan.inputs, plan.shard or (0, 1))
    encode = plan.encode
    names = OPTIONS.get(encode.tokenizer.tokenizer_type, ())
    options = {name: getattr(encode.tokenizer, name) for name in names}
    tokenizer = describe_tokenizer(encode.tokenizer) | {"options": options}
    decides = {
        "inputs": fingerprint(units),
        "keys": list(encode.json_keys),
        "tokenizer": decides_ids(tokenizer),
        "append_eod": encode.append_eod,
        "vocab_size": encode.vocab_size,
        "shard": None if plan.shard is None else list(plan.shard),
        "on_error": "skip" if encode.skip_bad else "stop",
        "shuffle": plan.shuffle_seed,
    }
    decides = json.loads(json.dumps(decides))  # as a journal gives it back
    return Job(plan=plan, units=units, tokenizer=tokenizer, decides=decides)


def finished(job: Job) -> list[CorpusSummary] | None:
    """Tell what the corpora of a job hold where they are there already; None: they are not.

    Raises:
        DataError: one of them is not what its record says.
    """
    found = []
    if journal_path(job.plan.prefix).exists():
        return None
    for key in job.plan.encode.json_keys:
        prefix = job.plan.corpus_prefix(key)
        record = read_record(prefix)
        if record is None or record.plan != digest_of(job.decides):
            return None
        verify(prefix, record, "quick")
        found.append(summary_of(prefix, record))
    return found


def summary_of(prefix: str, record: CorpusRecord) -> CorpusSummary:
    """Tell what a corpus holds by its record."""
    return CorpusSummary(
        prefix, record.documents, record.tokens, record.rejected, np.dtype(record.dtype)
    )
