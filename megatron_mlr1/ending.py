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
    and SIGTERM give 128 + their number, after the work has removed what it half wrote.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
