"""What one process finds wrong ends all of them, with one message."""

from collections.abc import Callable

import torch.distributed

from megatron_mlr1.errors import Mlr1Error

SHARED = "every process of the run has this error"
"""The note on an error that only one process need print."""


def agreed[T](work: Callable[[], T]) -> T:
    """Do something on every process, and raise on all of them where one of them raised.

    Args:
        work: does not talk to other processes; what it raises that is no `Mlr1Error` goes through.

    Raises:
        Mlr1Error: of the first process that has one.
    """
    done: list[T] = []
    error: Mlr1Error | None = None
    try:
        done.append(work())
    except Mlr1Error as found:
        error = found
    errors: list[Mlr1Error | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    for shared in filter(None, errors):
        shared.add_note(SHARED)
        raise shared
    return done[0]
