"""Training, validation and test parts of a corpus, as the engine cuts them."""

from collections.abc import Iterable, Sequence

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.errors import DataError

NAMES = ("training", "validation", "test")
Share = tuple[float, float]
"""Where a part begins and ends in a corpus, 0 to 1."""
Part = Share | None
"""The share of a part; None where nothing is asked of it."""


def refuse_empty_parts(prefixes: Iterable[str], parts: Sequence[Part]) -> None:
    """Check that every corpus is whole and has documents in every part that will be read.

    The engine counts epochs until a part has enough tokens; over a part without a document it
    counts for ever.

    Args:
        prefixes: paths of the corpora without .bin and .idx.
        parts: training, validation, test, by the engine's `split_matrix`.

    Raises:
        DataError: a file is broken, or a part is empty; names the corpus.
    """
    for prefix in prefixes:
        count = open_corpus(prefix).lengths.size
        for name, part in zip(NAMES, parts, strict=True):
            # The engine's own rounding (BlendedMegatronDatasetBuilder, Megatron-Core 0.19).
            if part is not None and round(part[0] * count) == round(part[1] * count):
                raise DataError(
                    f"{prefix} has {count} document(s), and --split leaves none of them for "
                    f"{name}; each part that is read needs one. Give a larger share, such as "
                    "--split 90,10,0, a larger corpus, or --eval-iters 0 for no evaluation."
                )
