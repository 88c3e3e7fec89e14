"""Merge common, stage, model, a user's recipe and the command line into one list of engine flags.

Each layer wins over the one before it: common < stage < model < --recipe FILE < the user's words.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import Mlr1Options, choose, split_words
from megatron_mlr1.recipes import sheet as sheets
from megatron_mlr1.recipes.batch import (
    Layout,
    fitting_micro_batch,
    refuse_misfit,
    scheduled_batches,
)
from megatron_mlr1.recipes.data_flags import DATA_FLAGS, SPLIT_PATHS, refuse_the_others_flags
from megatron_mlr1.recipes.sheet import Flag, Mixture, Sheet

PARALLEL_FLAGS = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
)
"""Their product is the number of devices that hold one copy of the model."""

DISPLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("fp16",),
        "fp16": ("bf16",),
        "train-iters": ("train-samples",),
        "train-samples": ("train-iters",),
        "lr-warmup-iters": ("lr-warmup-fraction", "lr-warmup-samples"),
        "lr-warmup-fraction": ("lr-warmup-iters", "lr-warmup-samples"),
        "lr-warmup-samples": ("lr-warmup-iters", "lr-warmup-fraction"),
        "step-batch-size-schedule": ("global-batch-size",),
        "vocab-size": ("padded-vocab-size",),
        **dict.fromkeys(SPLIT_PATHS, ("split",)),
    }
)
"""Flags that a flag of a higher layer replaces, because the engine refuses or ignores the pair."""

IN_ITERATIONS = ("train-iters", "lr-warmup-iters", "lr-decay-iters", "lr-wsd-decay-iters")
"""Flags that count iterations; each has a sister that counts samples."""

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "teacher": "distils a teacher's distribution, and --teacher is missing. Serve one with "
        "tools/serve_teacher.py and give its address (docs/distillation.md); for plain "
        "cross-entropy on this stage's corpora use `--stage pretrain_phase2 --mixture {mixture}` "
        "with the numbers of `python tools/recipes.py show {model} {stage}`.",
    }
)
"""What a stage can need beside its corpora, and what to do without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A command line, expanded."""

    words: tuple[str, ...]
    """The engine's words: the recipe's, then the user's; our own flags are gone."""

    flags: tuple[Flag, ...]
    """The same, flag by flag with the source of each."""

    options: Mlr1Options
    """Our own flags, with model and stage known."""

    mixture: Mixture | None
    """The corpora to read; None where the user brings the data by an engine flag."""

    switches: tuple[tuple[int, Mixture], ...]
    """(consumed samples, the mixture from there on), by rising sample; none of them at 0."""

    dataset: str
    """Whose datasets give the samples, one of `DATASETS`; mock data are the engine's own."""

    starts_from: str | None
    """The stage whose weights this one starts from; None starts from random weights."""

    needs: str | None
    """What the command line must bring to run the stage, a key of `NEEDS`."""

    def require_runnable(self) -> None:
        """Refuse to train what this command line cannot.

        Raises:
            ConfigError: the stage needs what was not given, or the corpora have no folder.
        """
        model, stage = self.options.model, self.options.stage
        if self.needs == "teacher" and self.options.distillation.teacher is None:
            mixture = "NAME" if self.mixture is None else self.mixture.name
            reason = NEEDS[self.needs].format(model=model, stage=stage, mixture=mixture)
            raise ConfigError(f"Stage {stage} {reason}")
        if self.mixture is not None and self.options.data_root is None:
            raise ConfigError(
                f"Stage {stage} reads the mixture {self.mixture.name}, and --data-root is missing. "
                "Give the folder that holds its corpora, or your own data by --data-path."
            )


def expand(words: Sequence[str], world_size: int) -> Plan:
    """Expand `--model`, `--stage` and `--recipe` into the engine's flags.

    Args:
        words: the command line without the program's name.
        world_size: processes of the whole run.

    Raises:
        ConfigError: an unknown name, a recipe that cannot be read, flags that contradict each
            other, or a batch that does not fit the number of processes.
    """
    options, user_words = split_words(words)
    recipe = _user_recipe(options)
    model_name = _name("model", options.model or recipe.model)
    stage_name = _name("stage", options.stage or recipe.stage)
    options = replace(options, model=model_name, stage=stage_name)
    model, stage = sheets.packaged("models", model_name), sheets.packaged("stages", stage_name)
    merged = merge(layer.flags for layer in (sheets.common(), stage, model, recipe))
    for name in options.without:
        del merged[choose(name, merged, "flag in this recipe called")]
    user = user_flags(user_words)
    final = merge([merged.values(), user])
    kept = {name: flag for name, flag in merged.items() if final.get(name) is flag}
    kept = _fit_batch(kept, final, world_size)
    _refuse_mixed_counts(final)
    _refuse_long_warmup(final)
    mixture = _mixture(options, recipe.mixture or stage.mixture, final)
    dataset = "megatron" if "mock-data" in final else options.dataset
    refuse_the_others_flags(options, final, dataset)
    return Plan(
        words=tuple(word for flag in kept.values() for word in flag.words) + user_words,
        flags=(*kept.values(), *user),
        options=options,
        mixture=mixture,
        switches=_switches(options, mixture),
        dataset=dataset,
        starts_from=stage.starts_from,
        needs=stage.needs,
    )


def merge(layers: Iterable[Iterable[Flag]]) -> dict[str, Flag]:
    """Lay flags over each other; a flag takes its rivals and its own former value away.

    Raises:
        ConfigError: a layer takes back a flag that no layer below it has.
    """
    merged: dict[str, Flag] = {}
    seen: set[str] = set()
    for layer in layers:
        flags = tuple(layer)
        for flag in flags:
            if flag.on:
                taken = DISPLACES.get(flag.name, ())
            else:
                taken = (choose(flag.name, sorted(seen), "flag to take back called"),)
            for name in taken:
                merged.pop(name, None)
        seen |= {flag.name for flag in flags}
        merged |= {flag.name: flag for flag in flags if flag.on}
    return merged


def user_flags(words: Sequence[str]) -> tuple[Flag, ...]:
    """Read the engine's flags out of a command line, in order; the engine's parser judges them."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.removeprefix("--").split("=", 1))
        elif groups:
            groups[-1].append(word)
    return tuple(
        Flag(name=name, values=tuple(values), source="the command line") for name, *values in groups
    )


def _user_recipe(options: Mlr1Options) -> Sheet:
    """Read the user's own recipe; without one, a layer without flags."""
    if options.recipe is None:
        return Sheet(about="", flags=())
    recipe = sheets.user_recipe(options.recipe)
    for flag in recipe.flags:
        if split_words(flag.words)[1] != flag.words:
            raise ConfigError(
                f"{options.recipe}: {flag.name} is not a flag of the engine, and `flags` takes "
                "those alone. Write model, stage and mixture beside `flags`; give our other flags "
                "on the command line."
            )
    return recipe


def _name(kind: str, name: str | None) -> str:
    """Refuse a model or a stage that nobody named."""
    if name is None:
        raise ConfigError(
            f"--{kind} is missing; it must be one of {', '.join(sheets.names(f'{kind}s'))}. "
            "Give it on the command line or in the file of --recipe."
        )
    return name


def _number(flags: Mapping[str, Flag], name: str) -> int | None:
    flag = flags.get(name)
    if flag is None:
        return None
    try:
        (text,) = flag.values
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"--{name} is {' '.join(flag.values)!r} ({flag.source}); it must be one whole number."
        ) from error


def _fit_batch(
    kept: dict[str, Flag], final: Mapping[str, Flag], world_size: int
) -> dict[str, Flag]:
    """Keep the global batch: lower the recipe's micro batch until it fits the devices."""
    layout = Layout(
        world_size=world_size,
        model_parallel=prod(_number(final, name) or 1 for name in PARALLEL_FLAGS),
    )
    batches = _global_batches(final)
    micro_batch = _number(final, "micro-batch-size")
    if not batches or micro_batch is None:
        return kept
    bound = kept.get("micro-batch-size")
    if bound is None:
        for batch in batches:
            refuse_misfit(batch, micro_batch, layout)
        return kept
    fitted = fitting_micro_batch(batches, micro_batch, layout)
    if fitted == micro_batch:
        return kept
    source = f"the largest up to {micro_batch} that {layout.data_parallel} copies can use"
    flag = replace(bound, values=(str(fitted),), source=f"{source}; {bound.source}")
    return kept | {flag.name: flag}


def _global_batches(flags: Mapping[str, Flag]) -> tuple[int, ...]:
    schedule = flags.get("step-batch-size-schedule")
    if schedule is not None:
        return scheduled_batches(" ".join(schedule.values))
    number = _number(flags, "global-batch-size")
    return () if number is None else (number,)


def _refuse_mixed_counts(flags: Mapping[str, Flag]) -> None:
    """Refuse a run that is counted in samples and in iterations.

    The engine reckons iterations of a batch-size schedule as if each had one micro batch for each
    copy of the model, so learning rate and data would end too early.
    """
    counter = next((n for n in ("step-batch-size-schedule", "train-samples") if n in flags), None)
    mixed = [name for name in IN_ITERATIONS if name in flags]
    if counter is not None and mixed:
        given = (f"{' '.join(flags[n].words)} ({flags[n].source})" for n in mixed)
        raise ConfigError(
            f"--{counter} counts a run in samples, and {' and '.join(given)} in iterations. Give "
            f"{' and '.join('--' + n.replace('iters', 'samples') for n in mixed)} instead: "
            "iterations times the global batch that they were meant for."
        )


def _refuse_long_warmup(flags: Mapping[str, Flag]) -> None:
    warmup = _number(flags, "lr-warmup-iters")
    decay = _number(flags, "lr-decay-iters") or _number(flags, "train-iters")
    if warmup is not None and decay is not None and warmup >= decay:
        raise ConfigError(
            f"--lr-warmup-iters is {warmup} ({flags['lr-warmup-iters'].source}) and the learning "
            f"rate is over after {decay} iterations; warm-up must be shorter than that. Give "
            "--lr-warmup-iters as well."
        )


def _mixture(
    options: Mlr1Options, in_recipe: str | None, flags: Mapping[str, Flag]
) -> Mixture | None:
    """Choose the mixture; None where an engine flag brings the data."""
    own = [name for name in DATA_FLAGS if name in flags]
    if own and options.mixture is not None:
        raise ConfigError(
            f"--mixture and --{own[0]} both say which data to read; only one may. Leave one out."
        )
    if own:
        return None
    name = options.mixture or in_recipe
    return None if name is None else sheets.mixture(name)


def _switches(options: Mlr1Options, mixture: Mixture | None) -> tuple[tuple[int, Mixture], ...]:
    """Read the mixtures that follow the first."""
    if options.mixture_switch and mixture is None:
        raise ConfigError(
            "--mixture-switch changes the mixture, and this run reads none: its data are given by "
            "path. Leave the paths out and give --mixture, or leave --mixture-switch out."
        )
    return tuple((sample, sheets.mixture(name)) for sample, name in options.mixture_switch)
