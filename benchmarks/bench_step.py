"""Claim: a whole training step is faster than stock's, and every op of ours is seen in it.

Each row is a run of the product's own command on one device over a synthetic corpus: tokens/s, MFU
and peak memory from its record and its log. "stock" is the same model without any op of ours, with
the engine's own fusions. "without-OP" is ours with one op off, "with-OP" with one that is no
default. "kd" learns from the null teacher, which costs the student nothing but its own side. Rows
come in the order in which they are wanted, for as many minutes as are given, and each is kept as
soon as it is measured. Without a GPU only `tiny` is run, for a few steps: that shows that the
program works, and says nothing of any GPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.flags import a_count, a_time
from benchmarks.frame import corpora, machine
from benchmarks.frame.precisions import PRECISIONS, missing
from benchmarks.frame.table import Table, kept_in, measured_by, parser
from benchmarks.frame.training import Outcome, train
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.model.precision import transformer_engine_version
from megatron_mlr1.model.shape import named_shape
from megatron_mlr1.options import KERNELS

STEM = "step"
TEACHER = {"cpu": "null:4096,256", "cuda": "null:128256,4096"}
"""The vocabulary and width of Llama 3.1 8B; on a CPU small."""
STOCK_FUSION = ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "native")
"""The engine's own fused loss; its fusions of norm, RoPE and dropout are on by default."""
DOCUMENT_TOKENS = {"cpu": 64, "cuda": 4096}
FP8_OUTPUT = "with-swiglu_fp8"
"""The variant whose activation writes FP8 itself, which it can with delayed scaling alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Length:
    """How long sequences are, and whether the documents in them are kept apart."""

    tokens: int
    is_packed: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """Say it in flags."""
        length = str(self.tokens)
        masks = ("--document-mask",) if self.is_packed else ()
        return ("--seq-length", length, "--max-position-embeddings", length, *masks)


LENGTHS: Mapping[machine.Device, Mapping[str, Length]] = {
    "cpu": {"64": Length(tokens=64), "256-packed": Length(tokens=256, is_packed=True)},
    "cuda": {
        "2048": Length(tokens=2048),
        "4096": Length(tokens=4096),
        "32k-packed": Length(tokens=32768, is_packed=True),
    },
}
MODELS = {"cpu": ("tiny",), "cuda": ("950m", "360m", "140m")}
MICRO_TOKENS = {"cpu": 512, "cuda": 32768}
STEPS = {"cpu": 6, "cuda": 50}
INTERVAL = {"cpu": 2, "cuda": 10}
FIRST = {"cpu": 2, "cuda": 20}
"""Steps that are not counted: allocators, autotuning and compilation come to rest."""
MINUTES = {"cpu": 0.0, "cuda": 10.0}
TIMEOUT_S = {"cpu": 400.0, "cuda": 180.0}
START_S, FLOPS = 25.0, 3e14
"""For the estimate alone: how long a run takes to its first step, and FLOP/s of its steps."""

TARGETS: Mapping[tuple[str, str, str], int] = {
    ("950m", "2048", "bf16"): 89_000,
    ("360m", "2048", "bf16"): 225_000,
    ("140m", "2048", "bf16"): 480_000,
    ("950m", "2048", "fp8-tensorwise"): 125_000,
    ("950m", "2048", "fp8-delayed"): 125_000,
    ("950m", "2048", "fp8-blockwise"): 125_000,
}
"""Tokens/s of ours that one H200 is to reach (docs/performance.md), by model, length, precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One row."""

    model: str
    length: str
    precision: str
    variant: str


def variants() -> dict[str, tuple[str, ...]]:
    """Give the words of every variant by its name."""
    teacher = ("--teacher", TEACHER[machine.device()])
    ours = {f"without-{op}": _kernels({op: "reference"}) for op in KERNELS if op != "linear_kl"}
    kd = {"kd-without-linear_kl": (*teacher, *_kernels({"linear_kl": "reference"}))}
    return {
        "stock": (*_kernels(stock_kernels()), *STOCK_FUSION),
        "ours": (),
        **ours,
        FP8_OUTPUT: _kernels({"swiglu": "mlr1_fp8"}),
        "kd": teacher,
        **(kd if "linear_kl" in KERNELS else {}),
    }


def stock_kernels() -> dict[str, str]:
    """Choose what is nearest to stock for each op: the engine's or Transformer Engine's own."""
    chosen = dict.fromkeys(KERNELS, "reference")
    if transformer_engine_version() is not None and "te" in KERNELS["swiglu"]:
        chosen["swiglu"] = "te"
    return chosen


def _kernels(chosen: Mapping[str, str]) -> tuple[str, ...]:
    return ("--mlr1-kernels", ",".join(f"{op}={name}" for op, name in chosen.items()))


def runs(device: machine.Device) -> Iterator[Run]:
    """Give all rows, the most wanted first."""
    first, *others = LENGTHS[device]
    bf16, *fp8 = precisions(device)
    delayed = [precision for precision in fp8 if precision == "fp8-delayed"]
    lasts = ("kd-without-linear_kl",)
    seen = ("stock", "ours", "kd", FP8_OUTPUT, *lasts)
    wanted: list[tuple[str, str, str]] = [(first, bf16, name) for name in ("stock", "ours")]
    wanted += [(first, precision, "ours") for precision in fp8]
    wanted += [(first, bf16, "kd")]
    wanted += [(first, precision, FP8_OUTPUT) for precision in delayed]
    wanted += [(first, bf16, name) for name in variants() if name not in seen]
    for length in reversed(others):
        wanted += [(length, bf16, "stock"), (length, bf16, "ours"), (length, bf16, "kd")]
        wanted += [(length, precision, "ours") for precision in fp8]
    wanted += [(first, bf16, name) for name in lasts]
    wanted += [(first, precision, name) for precision in fp8 for name in ("stock", "kd")]
    for length, precision, variant in wanted:
        for model in MODELS[device]:
            yield Run(model=model, length=length, precision=precision, variant=variant)


def precisions(device: machine.Device) -> tuple[str, ...]:
    """Name the precisions that are measured; the first is the recipe's own."""
    if device == "cpu":
        return ("fp32",)
    return tuple(name for name in PRECISIONS if not name.endswith("ends-bf16"))


def words_of(run: Run, micro_tokens: int, device: machine.Device) -> list[str]:
    """Say a row in the words of the product's command, without corpora and folders."""
    length = LENGTHS[device][run.length]
    batch = str(max(micro_tokens // length.tokens, 1))
    return [
        *("--model", run.model, "--stage", "pretrain_phase1"),
        *("--micro-batch-size", batch, "--global-batch-size", batch),
        *("--log-interval", str(INTERVAL[device])),
        *("--lr-warmup-iters", "2"),
        *length.words,
        *PRECISIONS.get(run.precision, ()),
        *variants()[run.variant],
    ]


def main() -> int:
    """Measure what was selected; 1 where a run fails that the product did not refuse."""
    device = machine.device()
    options = words_parser(device).parse_args()
    stem = STEM if options.part is None else f"{STEM}_{options.part}"
    table = Table(
        "The whole training step",
        (
            "model",
            "length",
            "precision",
            "variant",
            ">tokens/s",
            ">x stock",
            ">MFU",
            ">ms/step",
            ">peak GB",
            "target, tokens/s",
        ),
        about=_about(device, options),
        notes=(measured_by(STEM),),
        file=kept_in(options.save, stem),
    )
    failed = 0
    stock: dict[tuple[str, str, str], float] = {}
    rows = possible(selected(runs(device), options), table)
    _announce(rows, options, device)
    deadline = time.monotonic() + 60 * (options.minutes or float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        mixture = _corpora(Path(folder) / "corpora", device, options)
        data = ["--data-root", str(mixture.parent), "--mixture", str(mixture)]
        for number, run in enumerate(rows):
            if time.monotonic() > deadline:
                left = f"{len(rows) - number} rows are left (--minutes 0 measures all)."
                table.close(f"Stopped after {options.minutes:g} minutes; {left}")
                return int(failed > 0)
            words = [*words_of(run, options.micro_tokens, device), *data]
            save = Path(folder) / f"run{number}"
            outcome = train(words, save, steps=options.steps, timeout_s=options.timeout)
            failed += outcome.why is not None and not outcome.is_refused
            table.add(*cells(run, outcome, stock, device))
    table.close()
    return int(failed > 0)


def possible(rows: Iterator[Run], table: Table) -> list[Run]:
    """Keep the rows whose precision this machine has; the table gets the reason for the others."""
    kept, reasons = [], {}
    for run in rows:
        reason = missing(run.precision)
        if reason is None:
            kept.append(run)
        else:
            reasons[run.precision] = reason
    for precision, reason in reasons.items():
        table.add("all", "all", precision, "all", reason)
    return kept


def _announce(rows: Sequence[Run], options: argparse.Namespace, device: machine.Device) -> None:
    """Say on the screen how long it will take, about."""
    if device == "cuda":
        minutes = sum(seconds(run, options) for run in rows) / 60
        print(f"{len(rows)} rows, about {minutes:.0f} minutes.", file=sys.stderr, flush=True)


def seconds(run: Run, options: argparse.Namespace) -> float:
    """Guess how long a row takes on a Hopper GPU."""
    tokens, length = options.micro_tokens, LENGTHS["cuda"][run.length]
    within = DOCUMENT_TOKENS["cuda"] if length.is_packed else length.tokens
    flops = named_shape(run.model).training_flops(tokens, tokens * within)
    return float(START_S + options.steps * flops / FLOPS)


def cells(
    run: Run,
    outcome: Outcome,
    stock: dict[tuple[str, str, str], float],
    device: machine.Device,
) -> tuple[str, ...]:
    """Write a row; remembers stock's speed for the rows that follow."""
    place = (run.model, run.length, run.precision)
    begin = (*place, run.variant)
    speed = outcome.tokens_per_second(FIRST[device])
    if outcome.why is not None or speed is None:
        return (*begin, outcome.why or "too few steps to measure: raise --steps")
    if run.variant == "stock":
        stock[place] = speed
    mfu, peak = outcome.mfu(FIRST[device]), outcome.peak_bytes()
    step_tokens = outcome.rows[0]["tokens"]
    return (
        *begin,
        f"{speed:,.0f}",
        f"{speed / stock[place]:.2f}" if place in stock else "",
        "" if mfu is None else f"{mfu:.1%}",
        f"{1e3 * step_tokens / speed:,.1f}",
        "" if peak is None else f"{peak / 1e9:.1f}",
        target(place, run.variant, speed),
    )


def target(place: tuple[str, str, str], variant: str, speed: float) -> str:
    """Hold a speed of ours against the target, where there is one and this is its device."""
    here = machine.device() == "cuda" and machine.folder_of(machine.device_name()) == "h200"
    if not here or variant != "ours" or place not in TARGETS:
        return ""
    wanted = TARGETS[place]
    return f"{wanted:,}: {'met' if speed >= wanted else f'missed by {1 - speed / wanted:.0%}'}"


def selected(rows: Iterator[Run], options: argparse.Namespace) -> Iterator[Run]:
    """Keep the rows that were asked for."""
    for run in rows:
        asked = (
            run.model in options.models,
            run.length in options.lengths,
            run.precision in options.precisions,
            run.variant in options.variants,
        )
        if all(asked):
            yield run


def words_parser(device: machine.Device) -> argparse.ArgumentParser:
    """Give the parser of this program's own flags."""
    made = parser(__doc__, STEM)
    choices: Mapping[str, Sequence[str]] = {
        "models": MODELS[device],
        "lengths": list(LENGTHS[device]),
        "precisions": precisions(device),
        "variants": list(variants()),
    }
    for name, known in choices.items():
        made.add_argument(f"--{name}", nargs="+", choices=known, default=list(known))
    made.add_argument("--steps", type=a_count, default=STEPS[device], help="of each run")
    made.add_argument(
        "--micro-tokens",
        type=a_count,
        default=MICRO_TOKENS[device],
        help="tokens of a step, in one micro-batch (default %(default)s)",
    )
    made.add_argument(
        "--minutes",
        type=float,
        default=MINUTES[device],
        help="start no run later than that; 0 for no limit (default %(default)g)",
    )
    made.add_argument(
        "--timeout", type=a_time, default=TIMEOUT_S[device], help="seconds of one run"
    )
    made.add_argument("--part", help="keep the table as step_PART, where some rows are selected")
    return made


def _about(device: machine.Device, options: argparse.Namespace) -> tuple[str, ...]:
    stock = " ".join(variants()["stock"])
    here = (
        ""
        if device == "cuda"
        else (" NO GPU: the rows are of `tiny` on a CPU, and show only that the program works.")
    )
    return (
        machine.described() + here,
        f"One process, {options.micro_tokens:,} tokens a step in one micro-batch; {options.steps} "
        f"steps, speeds are the median of the intervals of {INTERVAL[device]} steps after step "
        f"{FIRST[device]}; packed documents have {DOCUMENT_TOKENS[device]:,} tokens on average. "
        f"Peak memory is what torch allocated. stock is `{stock}` on this package's model"
        f"{_layers(device)}; kd learns from `{TEACHER[device]}`.",
    )


def _layers(device: machine.Device) -> str:
    """Say what must be known of stock where it is not at its best."""
    if device == "cpu" or transformer_engine_version() is not None:
        return ""
    return (
        ", WITHOUT TRANSFORMER ENGINE: norms, attention and optimizer are torch's in all rows, and "
        "stock at its best is faster than this"
    )


def _corpora(root: Path, device: machine.Device, options: argparse.Namespace) -> Path:
    corpus = corpora.Corpus(
        num_ids=4096 if device == "cpu" else 128_256,
        num_tokens=(options.steps + 8) * options.micro_tokens,
        document_tokens=DOCUMENT_TOKENS[device],
    )
    return corpora.write(root, corpus)


if __name__ == "__main__":
    with clean_exit():
        sys.exit(main())
