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


def decided_by_first[T](work: Callable[[], T]) -> T:
    """Do something on the first process alone, and give its answer, or its error, to all of them.

    Args:
        work: does not talk to other processes; its answer can be pickled.

    Raises:
        Mlr1Error: what `work` raised.
    """
    answers: list[T | None] = [None]

    def on_first() -> None:
        if torch.distributed.get_rank() == 0:
            answers[0] = work()

    agreed(on_first)
    torch.distributed.broadcast_object_list(answers, src=0)
    answer: T = answers[0]  # type: ignore[assignment]
    return answer
