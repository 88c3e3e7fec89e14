"""Our own flags: argument groups, and the frozen options that they become. No torch here."""

import difflib
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from megatron_mlr1.distillation_options import DistillationOptions, add_distillation_arguments
from megatron_mlr1.errors import ConfigError

KERNELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "swiglu": ("mlr1", "reference", "mlr1_fp8", "liger", "te"),
        "linear_cross_entropy": ("mlr1", "reference", "liger", "quack", "te"),
        "linear_kl": ("mlr1", "reference", "liger"),
        "qk_norm_rope": ("mlr1", "reference"),
    }
)
"""The implementations of each op that has more than one; the first is the default."""

LOGITS = ("fp32", "bf16")
"""In what our losses keep a chunk of logits; the first is the default."""

DATASETS = ("mlr1", "megatron")
"""Whose datasets give the samples their order; the first is the default."""

LOADERS = ("thread", "dali")
"""What carries batches from the files to the model; the first is the default."""

VERIFY = ("quick", "full", "off")
"""How corpora are held against their records: sizes and tokenizer, every byte too, or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlr1Options:
    """What our own flags say."""

    model: str | None
    """Name of a model sheet; None leaves it to the user's recipe."""

    stage: str | None
    """Name of a stage sheet; None leaves it to the user's recipe."""

    recipe: Path | None
    """The user's own YAML, laid over model and stage."""

    without: tuple[str, ...]
    """Flags of the recipe that are left out, without their dashes."""

    from_scratch: bool
    """Start from random weights even where a stage starts from another's."""

    mixture: str | None
    """Name or file of a mixture; None means the stage's."""

    data_root: Path | None
    """Folder that holds the corpora of the mixture."""

    kernels: Mapping[str, str]
    """The implementation of every op in `KERNELS`."""

    logits: str
    """In what our losses keep a chunk of logits: one of `LOGITS`."""

    dataset: str
    """Whose order of samples: one of `DATASETS`."""

    loader: str
    """What carries the batches of our own order: one of `LOADERS`."""

    mixture_switch: tuple[tuple[int, str], ...]
    """(consumed sample, name or file of the mixture from there on), by rising sample."""

    verify_data: Literal["quick", "full", "off"]
    """How much of each corpus is held against its record before training: one of `VERIFY`."""

    document_mask: bool
    """Whether documents that share a sequence are kept apart."""

    new_data_order: bool
    """Go on from a checkpoint although its run read its data in another dataset's order."""

    peak_tflops: float | None
    """Peak dense TFLOP/s of one device, for MFU; None means the engine room's table of devices."""

    distillation: DistillationOptions
    """Whom the run learns from, and how."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and not (
            isfinite(self.peak_tflops) and self.peak_tflops > 0
        ):
            raise ConfigError(
                f"--peak-tflops is {self.peak_tflops}; it must be a positive number of TFLOP/s for "
                "one device. Take the dense figure of its data sheet, 989 for an H100 in bf16."
            )

    @classmethod
    def from_namespace(cls, namespace: Namespace) -> Self:
        """Freeze what `add_mlr1_arguments` parsed.

        Raises:
            ConfigError: an unknown op or implementation, or a figure out of range.
        """
        return cls(
            model=namespace.model,
            stage=namespace.stage,
            recipe=None if namespace.recipe is None else Path(namespace.recipe),
            without=_names(namespace.without),
            from_scratch=namespace.from_scratch,
            mixture=namespace.mixture,
            data_root=None if namespace.data_root is None else Path(namespace.data_root),
            kernels=MappingProxyType(_kernels(namespace.mlr1_kernels)),
            logits=namespace.mlr1_logits,
            dataset=namespace.mlr1_dataset,
            loader=namespace.mlr1_loader,
            mixture_switch=_switches(namespace.mixture_switch),
            verify_data=namespace.verify_data,
            document_mask=namespace.document_mask,
            new_data_order=namespace.new_data_order,
            peak_tflops=namespace.peak_tflops,
            distillation=DistillationOptions.from_namespace(namespace),
        )


def add_mlr1_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our flags to `parser`, in groups of their own, and give the parser back."""
    group = parser.add_argument_group(
        "MobileLLM-R1",
        "A recipe is a set of the flags below this group; whatever is written on the command line "
        "wins over it. `python tools/recipes.py list` names the models, stages and mixtures.",
    )
    group.add_argument("--model", metavar="NAME", help="the model, for example 950m or tiny")
    group.add_argument("--stage", metavar="NAME", help="the stage, for example pretrain_phase1")
    group.add_argument("--recipe", metavar="FILE", help="your own YAML, over model and stage")
    group.add_argument(
        "--without",
        metavar="FLAG[,FLAG]",
        help="leave these flags of the recipe out, for example bf16 to train in fp32",
    )
    group.add_argument(
        "--from-scratch",
        action="store_true",
        help="start a later stage from random weights, where --load is missing on purpose",
    )
    group.add_argument("--mixture", metavar="NAME|FILE", help="corpora in place of the stage's")
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="where the corpora of the mixture lie: DIR/NAME_text_document.bin and .idx, "
        "DIR/NAME_chat_document.bin and .idx, or DIR/NAME/*_document.bin and .idx",
    )
    _add_data_arguments(group)
    choices = "; ".join(f"{op}: {', '.join(names)}" for op, names in KERNELS.items())
    group.add_argument(
        "--mlr1-kernels",
        metavar="OP=NAME[,OP=NAME]",
        help=f"which implementation an op uses ({choices}; the first is the default)",
    )
    group.add_argument(
        "--mlr1-logits",
        choices=LOGITS,
        default=LOGITS[0],
        help="in what the losses of mlr1 keep a chunk of logits: fp32 (default), or bf16, which "
        "halves their traffic and costs about 1e-4 nats a token",
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="TFLOPS",
        help="peak dense TFLOP/s of one device, for MFU on a device that is not known",
    )
    add_distillation_arguments(parser)
    return parser


def _add_data_arguments(group: Any) -> None:
    group.add_argument(
        "--mixture-switch",
        metavar="SAMPLE=NAME|FILE[,...]",
        help="read another mixture from this consumed sample on",
    )
    group.add_argument(
        "--mlr1-dataset",
        choices=DATASETS,
        default=DATASETS[0],
        help="the order of the samples: mlr1 (default) needs no index and starts at once; megatron "
        "is Megatron's own, for going on with a run that began with it",
    )
    group.add_argument(
        "--new-data-order",
        action="store_true",
        help="go on from a checkpoint whose run had the other --mlr1-dataset",
    )
    group.add_argument(
        "--mlr1-loader",
        choices=LOADERS,
        default=LOADERS[0],
        help="what carries the batches of --mlr1-dataset mlr1: a thread (default), or an NVIDIA "
        "DALI pipeline; the batches are the same",
    )
    group.add_argument(
        "--verify-data",
        choices=VERIFY,
        default=VERIFY[0],
        help="hold every corpus against its record before training: sizes and tokenizer (quick, "
        "the default), every byte too (full), or not at all (off)",
    )
    group.add_argument(
        "--document-mask",
        action="store_true",
        help="keep documents that share a sequence apart: attention within each, positions from "
        "0, no loss across their bounds",
    )


def split_words(words: Sequence[str]) -> tuple[Mlr1Options, tuple[str, ...]]:
    """Take our own flags out of a command line; what is left is the engine's, in its order.

    Raises:
        ConfigError: one of our flags lacks its value or has a wrong one.
    """
    parser = add_mlr1_arguments(
        ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    )
    try:
        namespace, rest = parser.parse_known_args(list(words))
    except ArgumentError as error:
        raise ConfigError(f"{error}. `--help` shows what the flag takes.") from error
    return Mlr1Options.from_namespace(namespace), tuple(rest)


def choose(word: str, known: Iterable[str], what: str) -> str:
    """Give `word` back if it is one of `known`.

    Args:
        word: what somebody wrote.
        known: what may be written.
        what: the kind of thing, for the message: "model", "stage", ...

    Raises:
        ConfigError: `word` is not known; the message names the nearest that is, and all where
            they are few.
    """
    names = tuple(known)
    if word in names:
        return word
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    few = f"Known: {', '.join(names)}." if len(names) <= 12 else ""
    raise ConfigError(f"There is no {what} {word!r}. {hint}{few}".rstrip())


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip().removeprefix("--") for name in text.split(",")) if text else ()


def _switches(text: str | None) -> tuple[tuple[int, str], ...]:
    switches: list[tuple[int, str]] = []
    for pair in text.split(",") if text else ():
        sample, equals, name = (part.strip() for part in pair.partition("="))
        if not equals or not name or not sample.isdecimal() or int(sample) == 0:
            raise ConfigError(
                f"--mixture-switch has {pair!r}; it takes SAMPLE=NAME pairs with commas between "
                "them, SAMPLE the number of consumed samples, at least 1: 1024000000=midtrain."
            )
        if switches and int(sample) <= switches[-1][0]:
            raise ConfigError(
                f"--mixture-switch has {sample} after {switches[-1][0]}; the samples must rise. "
                "Put the switches in their order, one mixture for each sample."
            )
        switches.append((int(sample), name))
    return tuple(switches)


def _kernels(text: str | None) -> dict[str, str]:
    chosen: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        op, equals, name = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ConfigError(
                f"--mlr1-kernels has {pair!r}; it takes OP=NAME pairs with commas between them, "
                "for example swiglu=reference."
            )
        choose(op, KERNELS, "op with a choice of kernels called")
        if op in chosen:
            raise ConfigError(
                f"--mlr1-kernels names {op} twice, with {chosen[op]} and with {name}; an op has "
                "one implementation. Leave one of the two out."
            )
        chosen[op] = choose(name, KERNELS[op], f"implementation of {op} called")
    return {op: names[0] for op, names in KERNELS.items()} | chosen
