"""A corpus as a ring of tokens: which run of them each sample of an epoch reads.

A part (training, validation, test) of T tokens has floor(T / L) samples of L inputs in each epoch.
Item k of epoch e is the L + 1 tokens (inputs, and labels one later) that begin at place

    (origin(e) + k L) mod T

of the part taken as a ring. `origin` is drawn anew for each epoch, so samples begin and end at
other tokens each time. Within an epoch no token is an input twice; T mod L of them (fewer than L),
those before the origin, are no input in it, and they lie elsewhere in the next. A sample that
passes the end of the ring joins the last document to the first, as it joins any two neighbours.
"""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.errors import DataError
from megatron_mlr1.ops.splitmix import outputs


def stream_key(seed: int, key: str) -> int:
    """Key a stream's permutations and origins: BLAKE2b (RFC 7693) of seed and name, 64 bits."""
    digest = blake2b(f"{seed}\0{key}".encode(), digest_size=8, person=b"mlr1 order").digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPart:
    """Training, validation or test part of a corpus."""

    prefix: str
    """The corpus, without .bin and .idx."""

    dtype: np.dtype[Any]
    """Type of a token in the .bin."""

    first_token: int
    """Where the part begins in the .bin, in tokens."""

    num_tokens: int
    """Tokens of the part, 1 or more."""

    def num_items(self, seq_length: int) -> int:
        """Count the samples of one epoch; 0 where the part is shorter than one."""
        return self.num_tokens // seq_length

    def origin(
        self, epoch: NDArray[np.int64], item: NDArray[np.int64], seq_length: int, key: int
    ) -> NDArray[np.int64]:
        """Say where samples begin.

        Args:
            epoch: epoch of each sample.
            item: item of each, 0 to `num_items(seq_length)` - 1; the same shape, or one that
                broadcasts.
            seq_length: inputs of a sample, L.
            key: `stream_key` of the seed and the stream.

        Returns:
            Places in the part, 0 to `num_tokens` - 1, as int64: the sample is the tokens
            `first_token + (place + 0..L) % num_tokens` of the .bin.
        """
        # Not the words that key the permutations of the same epochs.
        seeds = np.array(~key % (1 << 64), np.uint64)
        words = outputs(seeds, np.asarray(epoch, np.uint64))
        begins = (words % np.uint64(self.num_tokens)).astype(np.int64)
        return (begins + np.asarray(item, np.int64) * seq_length) % self.num_tokens


def part_of(prefix: str, begin: float, end: float) -> TokenPart:
    """Find a part of a corpus by its borders, as the engine cuts it: between sequences.

    Checks the corpus as `open_corpus` does and reads two numbers of its index more, so the cost
    depends neither on documents nor on tokens.

    Args:
        prefix: the corpus, without .bin and .idx.
        begin: where the part begins, 0 to 1.
        end: where it ends.

    Raises:
        DataError: the corpus is broken, or the part has no token.
    """
    corpus = open_corpus(prefix)
    count = corpus.lengths.size
    # The engine's own rounding (BlendedMegatronDatasetBuilder, Megatron-Core 0.19).
    first, last = round(begin * count), round(end * count)
    itemsize = corpus.tokens.dtype.itemsize
    borders = [
        corpus.num_tokens if place == count else int(corpus.begins[place]) // itemsize
        for place in (first, last)
    ]
    num_tokens = borders[1] - borders[0]
    if num_tokens <= 0:
        raise DataError(
            f"{prefix} has {count} sequences, and the part from {begin:.6g} to {end:.6g} of them "
            "holds no token; each part that is read needs some. Give it a larger share in --split, "
            "or a larger corpus."
        )
    return TokenPart(
        prefix=prefix,
        dtype=corpus.tokens.dtype,
        first_token=borders[0],
        num_tokens=num_tokens,
    )
