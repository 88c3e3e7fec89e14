"""Print what the demo did in one table, and where to look next."""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from megatron_mlr1.data.index import open_corpus

SEPARATOR = "\n---\n"
"""Between the texts that write_text.py keeps."""
SHOWN_CHARACTERS = 90

NEXT = """
Where to look
  curves        tensorboard --logdir {run}/tensorboard
  every step    {run}/metrics.jsonl
  whole log     {log}
  for your own code: AutoModelForCausalLM.from_pretrained("{exported}")"""


def main() -> None:
    """Read the demo's folder and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="what run.sh wrote to")
    folder: Path = parser.parse_args().folder
    rows = [*corpora(folder), *training(folder), *export(folder), *times(folder)]
    text = (folder / "sample.txt").read_text().split(SEPARATOR)[-1]
    rows.append(("it writes", " ".join(text.split())[:SHOWN_CHARACTERS] + " ..."))
    print("\n".join(f"  {name:<18}{value}" for name, value in rows))
    print(
        NEXT.format(run=folder / "run", log=folder / "train.log", exported=folder / "hugging-face")
    )


def corpora(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the tokens of each corpus."""
    counts = {
        path.name.removesuffix("_text_document.idx"): open_corpus(str(path.with_suffix("")))
        for path in sorted((folder / "corpora").glob("*.idx"))
    }
    listed = ", ".join(f"{name} {corpus.num_tokens:,}" for name, corpus in counts.items())
    yield "corpora (tokens)", listed


def training(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield steps, losses and speed."""
    steps = read(folder / "run" / "metrics.jsonl")
    losses = [row["validation_loss"] for row in read(folder / "validation.jsonl")]
    speeds = [row["tokens_per_second"] for row in steps if "tokens_per_second" in row]
    yield "trained", f"{len(steps):,} steps, {steps[-1]['tokens']:,} tokens, stopped once"
    yield "training loss", f"{steps[0]['lm loss']:.3f} -> {steps[-1]['lm loss']:.3f}"
    yield "validation loss", f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    yield "tokens/s", f"{statistics.median(speeds):,.0f} (median)"


def export(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what the converter said of its proof."""
    for line in (folder / "export.log").read_text().splitlines():
        if "verified: " in line:
            yield "export", line.split("verified: ")[1]


def times(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the seconds of each part."""
    parts = [line.split("\t") for line in (folder / "seconds.tsv").read_text().splitlines()]
    yield "seconds", ", ".join(f"{name} {seconds}" for name, seconds in parts)


def read(path: Path) -> list[dict[str, float]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
