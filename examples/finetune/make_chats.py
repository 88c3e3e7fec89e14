"""Write small sets of chats in four of the layouts that published sets have.

sums        questions of addition, as `messages` (Tulu 3); some chats have two turns
products    problems of multiplication, as Parquet with `problem` and `generated_solution`
            (OpenMathReasoning)
lengths     how many letters a word has, as `input` and `output` (OpenScienceReasoning-2), gzipped
reversed    words backwards, as `prompt` and `response`
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

WORDS = (
    "apple bread chair cloud dance earth flame glass grape green heart horse house juice knife "
    "lemon light metal money month music night ocean paper peace phone piano plant queen quiet "
    "river salad sheep smile snake spoon stone storm sugar table tiger train uncle voice water"
)
LARGEST = 12


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--number", type=int, default=6000, help="chats in each file")
    options = parser.parse_args()
    folder, number = options.output, options.number
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    lines(folder / "sums.jsonl", ({"messages": sums(source)} for _ in range(number)))
    problems = pa.Table.from_pylist([product(source) for _ in range(number)])
    pa.parquet.write_table(problems, folder / "products.parquet")
    lines(folder / "lengths.jsonl.gz", (length(source) for _ in range(number)))
    lines(folder / "reversed.jsonl", (backwards(source) for _ in range(number)))
    print(f"{folder}: {4 * number:,} chats in four files")


def sums(source: random.Random) -> list[dict[str, str]]:
    """Ask for one or two sums."""
    messages: list[dict[str, str]] = []
    for _ in range(source.choice((1, 1, 2))):
        a, b = source.randint(0, LARGEST), source.randint(0, LARGEST)
        messages += (
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
        )
    return messages


def product(source: random.Random) -> dict[str, str]:
    """Ask for a product."""
    a, b = source.randint(0, LARGEST), source.randint(0, LARGEST)
    return {
        "problem": f"What is {a} times {b}?",
        "generated_solution": f"{a} times {b} is \\boxed{{{a * b}}}",
        "expected_answer": str(a * b),
    }


def length(source: random.Random) -> dict[str, str]:
    """Ask for the number of letters."""
    word = source.choice(WORDS.split())[: source.randint(2, 5)]
    return {
        "input": f"How many letters has {word}?",
        "output": f"It has {len(word)} letters.",
        "expected_answer": str(len(word)),
    }


def backwards(source: random.Random) -> dict[str, str]:
    """Ask for a word backwards."""
    word = source.choice(WORDS.split())
    return {"prompt": f"Write {word} backwards.", "response": word[::-1]}


def lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, compressed where the name says so."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


if __name__ == "__main__":
    main()
