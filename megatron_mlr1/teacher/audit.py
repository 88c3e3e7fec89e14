"""Whether replicas gave the same targets, and which one did not."""

from collections import Counter
from collections.abc import Mapping

import xxhash

from megatron_mlr1.teacher.spec import Targets


def bits(targets: Targets) -> bytes:
    """Hash the bits of all arrays; 16 bytes."""
    hasher = xxhash.xxh3_128()
    for array in targets.arrays.values():
        hasher.update(memoryview(array.reshape(-1).view("u1")))
    return hasher.digest()


def odd_one_out(answers: Mapping[str, Targets]) -> str | None:
    """Name the replica whose targets differ while all others agree; None where there is none.

    Two that differ say nothing about who is wrong, so it takes three.
    """
    marks = {name: bits(targets) for name, targets in answers.items()}
    counts = Counter(marks.values())
    if len(answers) < 3 or len(counts) != 2:
        return None
    (_, most), (rare, number) = counts.most_common()
    return next(name for name, mark in marks.items() if mark == rare) if number < most else None
