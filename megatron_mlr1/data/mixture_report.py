"""What a mixture means for a run: how often each corpus is read, and what of that is repetition."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron_mlr1.data.blend import Phase, Schedule
from megatron_mlr1.data.mixture import Blend, resolve
from megatron_mlr1.data.provenance import read_record
from megatron_mlr1.data.streams import part_of
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import split_words
from megatron_mlr1.recipes import Flag, Mixture, expand
from megatron_mlr1.recipes.sheet import mixture as read_mixture

MOST_EPOCHS = 4.0
"""From here on repeated tokens are worth visibly less than new ones (Muennighoff et al. 2023,
"Scaling data-constrained language models", arXiv 2305.16264)."""

MOST = 2**53
"""Samples, and tokens of one, at most: whole numbers up to here are exact where shares are."""

PUBLISHED_TOKENS = {
    "starcoder": 263.8e9,
    "openwebmath": 12.6e9,
    "fineweb_edu": 1300e9,
    "wiki": 3.7e9,
    "arxiv": 28e9,
    "stackexchange": 19.6e9,
    "algebraic_stack": 12.6e9,
    "nemotron_science": 2e9,
    "nemotron_code": 16e9,
    "nemotron_math": 15e9,
    "cosmopedia": 25e9,
    "natural_reasoning": 1.8e9,
    "finemath_3plus": 34e9,
    "pes2o": 50e9,
}
"""Tokens of the corpora of pre-training by their names in the mixtures: paper v1 Table 3. The
sizes of the others are not published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is read, and how much of it."""

    mixtures: tuple[tuple[int, Mixture], ...]
    """(first sample, mixture), by rising sample; the first from sample 0 on."""
    seq_length: int
    """Tokens of a sample."""
    num_samples: int
    training_share: float
    """The part of each corpus that `--split` leaves for training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """One pair of files of a corpus, or a corpus whose size alone is known, or not even that."""

    corpus: str
    weights: tuple[float, ...]
    """Its weight in each mixture of the run."""
    num_items: int | None
    """Samples, or packs, of one epoch."""
    num_tokens: int | None
    """Tokens of the training part."""
    tokens_an_item: float
    """Tokens that a sample reads; of packs the mean."""
    is_file: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a run reads of one corpus."""

    corpus: str
    weights: tuple[float, ...]
    """Its share in each mixture of the run; they sum to one over the corpora."""
    num_files: int
    """Pairs of files; 0 where the size is the published one, or unknown."""
    num_tokens: int | None
    """Tokens of its training part, on the disk or as published; None: not known."""
    num_samples: int
    """Samples that the run draws from it."""
    share: float
    """Part of all samples of the run."""
    drawn_tokens: int
    epochs: float | None
    """Drawn tokens by tokens."""
    repeated: float | None
    """Part of the drawn samples that an epoch before had."""


def plan_run(
    mixture: str,
    switches: str | None = None,
    *,
    stage: tuple[str, str] | None = None,
    seq_length: int | None = None,
    num_samples: int | None = None,
) -> Run:
    """Say what a run reads.

    Args:
        mixture: name or file.
        switches: as `--mixture-switch` takes them.
        stage: model and stage whose recipe gives what the two arguments below leave out.
        seq_length: tokens of a sample.
        num_samples: samples of the run.

    Raises:
        ConfigError: an unknown name, no length, or a switch after the run's end.
    """
    share = 1.0
    if stage is not None:
        plan = expand(["--model", stage[0], "--stage", stage[1], "--mixture", mixture], 1)
        flags = {flag.name: flag for flag in plan.flags}
        share = _training_share(flags["split"])
        if seq_length is None:
            seq_length = _number(flags["seq-length"])
        if num_samples is None:
            num_samples = _number(flags["train-iters"]) * _number(flags["global-batch-size"])
    if seq_length is None or num_samples is None:
        raise ConfigError(
            "How much is read is not known: give --model and --stage, or --seq-length (tokens of "
            "a sample) and --train-samples."
        )
    if not (1 <= seq_length <= MOST and 1 <= num_samples <= MOST):
        raise ConfigError(
            f"--seq-length is {seq_length} and --train-samples {num_samples}; both must be 1 to "
            f"{MOST}."
        )
    options, _ = split_words([] if switches is None else ["--mixture-switch", switches])
    for sample, name in options.mixture_switch:
        if sample >= num_samples:
            raise ConfigError(
                f"--mixture-switch {sample}={name} comes after the last of {num_samples} samples. "
                "Switch earlier, or give the samples of the whole run with --train-samples."
            )
    later = ((sample, read_mixture(name)) for sample, name in options.mixture_switch)
    return Run(
        mixtures=((0, read_mixture(mixture)), *later),
        seq_length=seq_length,
        num_samples=num_samples,
        training_share=share,
    )


def pools_below(run: Run, data_root: Path) -> tuple[Pool, ...]:
    """Measure the corpora of a run below a folder, as training does.

    Raises:
        DataError: corpora that are missing, broken, or without a token for training.
    """
    blends = [
        Blend(first_sample=first, corpora=resolve(mixture, data_root))
        for first, mixture in run.mixtures
    ]
    names = {it.prefix: it.name for blend in blends for it in blend.corpora}
    weights = [{it.prefix: it.weight for it in blend.corpora} for blend in blends]
    pools = []
    for prefix, name in names.items():
        part = part_of(str(prefix), 0.0, run.training_share)
        record = read_record(str(prefix))
        num_items, tokens_an_item = part.num_items(run.seq_length), float(run.seq_length)
        if record is not None and record.kind == "packs":
            num_items = round(run.training_share * record.documents)
            tokens_an_item = part.num_tokens / max(num_items, 1)
        pools.append(
            Pool(
                corpus=name,
                weights=tuple(weight.get(prefix, 0.0) for weight in weights),
                num_items=num_items,
                num_tokens=part.num_tokens,
                tokens_an_item=tokens_an_item,
                is_file=True,
            )
        )
    return tuple(pools)


def published_pools(run: Run) -> tuple[Pool, ...]:
    """Take the sizes that the paper gives; corpora without one have none."""
    weights = [{it.name: it.weight for it in mixture.corpora} for _, mixture in run.mixtures]
    pools = []
    for name in {name: None for weight in weights for name in weight}:
        size = PUBLISHED_TOKENS.get(name)
        num_tokens = None if size is None else round(size * run.training_share)
        pools.append(
            Pool(
                corpus=name,
                weights=tuple(weight.get(name, 0.0) for weight in weights),
                num_items=None if num_tokens is None else num_tokens // run.seq_length,
                num_tokens=num_tokens,
                tokens_an_item=run.seq_length,
                is_file=False,
            )
        )
    return tuple(pool for pool in pools if any(pool.weights))


def read(run: Run, pools: Sequence[Pool]) -> tuple[Reading, ...]:
    """Count what a run reads of each corpus, exactly as training draws it."""
    phases = [
        Phase(first_sample=first, weights=tuple(pool.weights[number] for pool in pools))
        for number, (first, _) in enumerate(run.mixtures)
    ]
    schedule = Schedule(phases[0].weights, phases[1:])
    drawn = schedule.counts(run.num_samples).tolist()
    totals = [sum(phase.weights) for phase in phases]
    readings = []
    for corpus in {pool.corpus: None for pool in pools}:
        mine = [it for it in zip(pools, drawn, strict=True) if it[0].corpus == corpus]
        weights = (sum(column) for column in zip(*(pool.weights for pool, _ in mine), strict=True))
        num_samples = sum(count for _, count in mine)
        drawn_tokens = sum(count * pool.tokens_an_item for pool, count in mine)
        sizes = [pool.num_tokens for pool, _ in mine if pool.num_tokens is not None]
        new = [min(pool.num_items, count) for pool, count in mine if pool.num_items is not None]
        readings.append(
            Reading(
                corpus=corpus,
                weights=tuple(w / total for w, total in zip(weights, totals, strict=True)),
                num_files=sum(pool.is_file for pool, _ in mine),
                num_tokens=sum(sizes) if sizes else None,
                num_samples=num_samples,
                share=num_samples / run.num_samples,
                drawn_tokens=round(drawn_tokens),
                epochs=drawn_tokens / sum(sizes) if sizes else None,
                repeated=1 - sum(new) / num_samples if new and num_samples else None,
            )
        )
    return tuple(readings)


def warnings(readings: Sequence[Reading], most_epochs: float = MOST_EPOCHS) -> Iterator[str]:
    """Say which corpora are read more often than that."""
    for it in readings:
        if it.epochs is not None and it.epochs > most_epochs:
            yield (
                f"{it.corpus} is read {it.epochs:.1f} times, more than {most_epochs:g}; repeated "
                "tokens are worth less than new ones (arXiv 2305.16264)."
            )


def table(run: Run, readings: Sequence[Reading]) -> str:
    """Write the readings for a person: one line a corpus, and a sum."""
    rows = [["corpus", "weight", "files", "tokens", "samples", "drawn", "epochs", "repeated"]]
    for it in readings:
        rows.append(
            [
                it.corpus,
                " -> ".join(f"{weight:.2%}" for weight in it.weights),
                str(it.num_files) if it.num_files else "-",
                _or_unknown(it.num_tokens, _short),
                f"{it.num_samples:,}",
                _short(it.drawn_tokens),
                _or_unknown(it.epochs, "{:.2f}".format),
                _or_unknown(it.repeated, "{:.1%}".format),
            ]
        )
    drawn = sum(it.drawn_tokens for it in readings)
    rows.append(["all", "", "", "", f"{run.num_samples:,}", _short(drawn), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 1 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def title(run: Run) -> str:
    """Name the mixtures of a run and where each begins, in one line."""
    firsts = [first for first, _ in run.mixtures]
    ends = [*(end for _, end in pairwise(firsts)), run.num_samples]
    parts = (
        f"{mixture.name} (samples {first:,} to {end - 1:,})"
        for (first, mixture), end in zip(run.mixtures, ends, strict=True)
    )
    held = "" if run.training_share == 1 else f", {run.training_share:.4g} of each corpus"
    return f"{', then '.join(parts)}; {run.seq_length:,} tokens a sample{held}"


def _or_unknown[Number: (int, float)](number: Number | None, write: Callable[[Number], str]) -> str:
    return "?" if number is None else write(number)


def _short(number: float) -> str:
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= power:
            return f"{number / power:.1f}{unit}"
    return f"{number:.0f}"


def _number(flag: Flag) -> int:
    return int(flag.values[0])


def _training_share(flag: Flag) -> float:
    """Give the part of `--split` that is for training; the flag is that of a packaged recipe."""
    parts = [float(part) for part in flag.values[0].split(",")]
    return parts[0] / sum(parts)
