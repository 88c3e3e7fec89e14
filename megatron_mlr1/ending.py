"""How a program ends: what its user reads, and the exit status that a script reads."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_mlr1.errors import Mlr1Error


@contextmanager
def clean_exit() -> Iterator[None]:
    """Run a program's work; say in one line why it ended early.

    An `Mlr1Error` is printed to stderr without a traceback and gives its own exit status. SIGINT
    and SIGTERM give 128 + their number, after the work has removed what it half wrote, whatever
    the work made of them: compiled code that a signal meets may raise an error of its own instead.
    """
    heard: list[int] = []

    def leave(number: int, frame: object) -> NoReturn:
        heard.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    except BaseException as error:
        if heard:
            raise SystemExit(128 + heard[0]) from None
        if isinstance(error, Mlr1Error):
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
