"""SplitMix64 gives the numbers of its published generator."""

import numpy as np

from megatron_mlr1.ops.splitmix import mix64, outputs


def test_the_first_outputs_are_those_that_are_published():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = np.arange(5, dtype=np.uint64)
    assert outputs(np.uint64([1234567]), numbers).tolist() == published


def test_an_output_needs_none_before_it():
    numbers = np.array([[10**15], [2**63]], np.uint64)
    seeds = np.array([0, 2**64 - 1], np.uint64)
    states = [
        [(int(seed) + (int(number) + 1) * 0x9E3779B97F4A7C15) % 2**64 for seed in seeds]
        for number in numbers[:, 0]
    ]
    assert outputs(seeds, numbers).tolist() == mix64(np.array(states, np.uint64)).tolist()
