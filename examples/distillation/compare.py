"""Show both students side by side, and what the killed replica cost; fail where it did not help."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Print the table; give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what run.sh wrote to")
    folder: Path = parser.parse_args().folder
    alone, taught = (losses(folder / f"{name}.jsonl") for name in ("alone", "taught"))
    print("      step   validation loss alone   with the teacher")
    for step, loss in alone.items():
        print(f"{step:>10}{loss:>24.3f}{taught[step]:>19.3f}")
    steps = read(folder / "taught" / "metrics.jsonl")
    ledger = read(folder / "taught" / "teacher.jsonl")
    waits = sorted(step["kd wait ms"] for step in steps)
    print(
        f"  {len(ledger)} steps in the ledger, "
        f"{sum(row['branch'] == 'kd' for row in ledger)} of them with the teacher; "
        f"requests that moved to another replica: {steps[-1]['teacher failovers']:.0f}; "
        f"kd_wait_ms: {waits[len(waits) // 2]:.1f} (median), {waits[-1]:.1f} (longest)"
    )
    last = max(alone)
    if taught[last] < alone[last]:
        return 0
    print("The teacher did not help; something is wrong with this run.", file=sys.stderr)
    return 1


def losses(path: Path) -> dict[int, float]:
    """Read the validation losses by step."""
    return {int(row["iteration"]): row["validation_loss"] for row in read(path)}


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
