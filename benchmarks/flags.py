"""What the flags of a benchmark take; `argparse` says what is wrong, and ends with code 2."""

import argparse
import math


def a_count(word: str) -> int:
    """Read a whole number of 1 or more.

    Raises:
        ValueError, argparse.ArgumentTypeError: it is none.
    """
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} counts something, so it must be 1 or more")
    return number


def a_time(word: str) -> float:
    """Read a time above 0.

    Raises:
        ValueError, argparse.ArgumentTypeError: it is none.
    """
    number = float(word)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is a time, so it must be a number above 0")
    return number
