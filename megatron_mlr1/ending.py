"""How a program ends: what its user reads, and the exit status that a script reads."""

import io
import os
import select
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
    Where nobody reads what is printed any more (`| head -1`), the end is that of SIGPIPE, in
    silence; where it cannot be kept, on a full disk, the message is one of a user's error.
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
        if sys.stdout is not None:  # which is closed
            sys.stdout.flush()
    except BaseException as error:
        lost = _lost_output()
        if heard:
            raise SystemExit(128 + heard[0]) from None
        if isinstance(error, BrokenPipeError) and isinstance(lost, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        if lost is not None and isinstance(error, OSError):
            words = f"What is printed cannot be written: {lost.strerror}. Send it elsewhere."
            print(words, file=sys.stderr)
            raise SystemExit(Mlr1Error.exit_code) from None
        if isinstance(error, Mlr1Error):
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lost_output() -> OSError | None:
    """Tell why what is printed goes nowhere, if it does; Python's end must not trip over it."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
        reader = select.poll()  # unbuffered output has nothing to flush
        reader.register(sys.stdout.fileno(), select.POLLOUT)
        if any(event & select.POLLERR for _, event in reader.poll(0)):
            raise BrokenPipeError
    except io.UnsupportedOperation:  # no file, but what a caller put in its place
        return None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
