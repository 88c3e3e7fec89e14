"""What a checkpoint says about its model, and the refusal of models that are no MobileLLM-R1."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mlr1.errors import CheckpointError
from megatron_mlr1.model.shape import ModelShape

MISSING = object()
"""Stands for a field that is not there, which is not the same as one that is null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The numbers that differ between one MobileLLM-R1 and another."""

    shape: ModelShape
    rotary_base: float
    """Theta of the rotary embedding."""
    max_positions: int
    """Longest sequence the model was trained on, in tokens."""
    norm_epsilon: float


def check_fields(
    found: Mapping[str, object], required: Mapping[str, tuple[object, ...]], *, where: str
) -> None:
    """Check that every field has one of the values that a MobileLLM-R1 allows.

    Args:
        found: the fields as they were read.
        required: for each field its allowed values; `MISSING` among them lets it be absent.
        where: names the file or folder in the message.

    Raises:
        CheckpointError: names the first field with another value.
    """
    for name, allowed in required.items():
        value = found.get(name, MISSING)
        if not any(value is one or value == one for one in allowed):
            has = "is missing" if value is MISSING else f"is {value!r}"
            wanted = " or ".join(repr(one) for one in allowed if one is not MISSING)
            raise CheckpointError(
                f"{where}: unknown architecture: {name} {has}; a MobileLLM-R1 has {wanted}. Only "
                "models of this architecture can be converted."
            )


def integer(found: Mapping[str, object], name: str, *, where: str) -> int:
    """Read a positive whole number.

    Raises:
        CheckpointError: the field is absent or something else.
    """
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(
            f"{where}: {name} is {value!r}; it must be a positive whole number. Was the file "
            "edited?"
        )
    return value


def number(found: Mapping[str, object], name: str, *, where: str) -> float:
    """Read a positive number.

    Raises:
        CheckpointError: the field is absent or something else.
    """
    value = found.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(
            f"{where}: {name} is {value!r}; it must be a positive number. Was the file edited?"
        )
    return float(value)
