"""Flags that say which data a run reads, and which of them each kind of dataset understands."""

from collections.abc import Mapping

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import LOADERS, Mlr1Options
from megatron_mlr1.recipes.sheet import Flag

SPLIT_PATHS = ("train-data-path", "valid-data-path", "test-data-path", "per-split-data-args-path")
DATA_FLAGS = ("data-path", "data-args-path", "mock-data", *SPLIT_PATHS)
"""With any of these the data are given by path, and no mixture is read."""

MEGATRONS = (
    "dataloader-type",
    "full-validation",
    "multiple-validation-sets",
    "hybrid-context-parallel",
    "reset-position-ids",
    "reset-attention-mask",
    "eod-mask-loss",
    "fim-data",
    "object-storage-cache-path",
    "per-dataset-sequences-path",
    "phase-transition-iterations",
)
"""The engine's flags that mean its own datasets and loaders, and would do nothing with ours."""


def refuse_the_others_flags(options: Mlr1Options, flags: Mapping[str, Flag], dataset: str) -> None:
    """Refuse flags that the chosen dataset does not know.

    Args:
        options: our own flags.
        flags: the engine's, recipe and command line together.
        dataset: the one that this run reads by.

    Raises:
        ConfigError: names the flag.
    """
    if dataset == "mlr1":
        theirs = [name for name in MEGATRONS if name in flags]
        if theirs:
            raise ConfigError(
                f"--{theirs[0]} ({flags[theirs[0]].source}) belongs to Megatron's datasets, and "
                "this run reads by --mlr1-dataset mlr1. Leave it out (--document-mask keeps "
                "documents apart, --mixture-switch changes the mixture), or give --mlr1-dataset "
                "megatron."
            )
        return
    ours = {
        "--mixture-switch": bool(options.mixture_switch),
        "--mlr1-loader": options.loader != LOADERS[0],
        "--teacher": options.distillation.teacher is not None,
    }
    for flag, given in ours.items():
        if given:
            raise ConfigError(
                f"{flag} belongs to --mlr1-dataset mlr1, and this run reads by Megatron's "
                "datasets. Leave it out, or read by --mlr1-dataset mlr1."
            )
