#!/usr/bin/env python
"""Make the CURVE keys of a teacher pool and of the students that may use it."""

import argparse
from pathlib import Path

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.teacher.keys import POOL, STUDENTS, make_pair


def main() -> None:
    """Make one pair of keys, or two, and say where the secrets are."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the keys; keep it from others")
    parser.add_argument("--pool", action="store_true", help="make the pool's pair")
    parser.add_argument(
        "--student", metavar="NAME", help="make the pair of a student, for one training run or more"
    )
    args = parser.parse_args()
    if not args.pool and args.student is None:
        parser.error("say --pool, --student NAME, or both")
    with clean_exit():
        secrets = [make_pair(args.folder, POOL)] if args.pool else []
        if args.student is not None:
            secrets.append(make_pair(args.folder / STUDENTS, args.student))
        for path in secrets:
            print(
                f"{path}: secret, readable by its owner alone; {path.stem}.key beside it is public"
            )


if __name__ == "__main__":
    main()
