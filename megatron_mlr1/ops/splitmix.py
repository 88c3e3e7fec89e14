"""SplitMix64, the generator that keys the order of samples, on NumPy arrays.

    state_j  = seed + j * 0x9E3779B97F4A7C15   (mod 2**64), j = 1, 2, ...
    output_j = mix64(state_j)

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
constants of Vigna's public-domain splitmix64.c (prng.di.unimi.it). Any output is reached without
those before it.
"""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_ONE = np.uint64(1)

Words = NDArray[np.uint64]


@np.errstate(over="ignore")  # NumPy warns of scalars, not of arrays
def outputs(seeds: Words, numbers: Words) -> Words:
    """Give output `numbers` + 1 of the generators that `seeds` begin; shapes broadcast."""
    state = seeds + (numbers + _ONE) * GOLDEN
    return mix64(state)


def mix64(state: Words) -> Words:
    """Mix the bits of each word; a bijection of 64-bit words."""
    state = (state ^ (state >> _SHIFTS[0])) * _MULTIPLIERS[0]
    state = (state ^ (state >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return state ^ (state >> _SHIFTS[2])
