"""Show what a run will read: the tokens of each corpus, its share, and how often it is repeated."""

import argparse
import sys
from pathlib import Path

from megatron_mlr1.data.index import open_corpus
from megatron_mlr1.data.mixture import resolve
from megatron_mlr1.errors import Mlr1Error
from megatron_mlr1.recipes.sheet import mixture

ROW = "{:<12}{:>12}{:>12}{:>9}{:>16}{:>9}"


def main() -> int:
    """Print one row for each corpus; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mixture", required=True, metavar="NAME|FILE")
    parser.add_argument("--tokens", type=int, required=True, help="that the run trains on")
    options = parser.parse_args()
    try:
        corpora = resolve(mixture(options.mixture), options.data_root)
        opened = [open_corpus(str(corpus.prefix)) for corpus in corpora]
    except Mlr1Error as error:
        print(error, file=sys.stderr)
        return error.exit_code
    total = sum(corpus.weight for corpus in corpora)
    print(ROW.format("corpus", "documents", "tokens", "weight", "tokens to read", "epochs"))
    for corpus, files in zip(corpora, opened, strict=True):
        weight = corpus.weight / total
        to_read = weight * options.tokens
        print(
            ROW.format(
                corpus.name,
                f"{files.num_documents:,}",
                f"{files.num_tokens:,}",
                f"{weight:.0%}",
                f"{to_read:,.0f}",
                f"{to_read / files.num_tokens:.2f}",
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
