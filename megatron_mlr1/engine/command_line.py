"""The command line that the engine's parser gets, and what it would answer with a stack trace."""

from argparse import Action, ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from megatron.training.arguments import add_megatron_arguments

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import add_mlr1_arguments, choose

USAGE = (
    "torchrun --nproc-per-node N -m megatron_mlr1.train --model NAME --stage NAME --data-root DIR "
    "--save DIR [any Megatron flag]"
)


def parser() -> ArgumentParser:
    """Give a parser of our flags, first, and then all of the engine's, in its groups."""
    ours = ArgumentParser(
        prog="megatron_mlr1.train",
        usage=USAGE,
        description="Train a MobileLLM-R1 by a recipe. A word of yours wins over the recipe's.",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_megatron_arguments(add_mlr1_arguments(ours))
    for action in ours._actions:
        # The engine writes "10%" where argparse wants "10%%": its own --help ends in a traceback.
        if action.help is not None and not _can_be_shown(action):
            action.help = action.help.replace("%", "%%")
    return ours


def _can_be_shown(action: Action) -> bool:
    try:
        _ = str(action.help) % vars(action)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def refuse_unknown(words: Sequence[str], known: ArgumentParser) -> None:
    """Refuse a flag that neither we nor the engine know.

    Raises:
        ConfigError: names the flag and the nearest that is known.
    """
    flags = list(known._option_string_actions)
    for word in words:
        if word.startswith("--"):
            choose(word.split("=", 1)[0], flags, "flag called")


def refuse_misread(words: Sequence[str], known: ArgumentParser) -> None:
    """Refuse a value that its flag does not take, where the engine's parser lists all of its flags.

    Raises:
        ConfigError: names the flag and what it takes.
    """
    try:
        _, strays = known.parse_known_args(words)
    except ArgumentError as error:
        reason = str(error).removeprefix("argument ")
        raise ConfigError(f"{reason}. `--help` shows what the flag takes.") from error
    if strays:
        raise ConfigError(
            f"{' '.join(strays)}: no flag before it takes that word. Leave it out, or put the name "
            "of its flag before it."
        )
