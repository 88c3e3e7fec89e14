"""Judge the log of a build: registers, spills and shared memory of each kernel for Hopper.

Ends with an error where a kernel spills registers, where our own sources or ptxas raise a warning,
or where the log names no kernel. Shared memory is the static part; what a launch adds is not known
to the compiler.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = "sm_90a"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'"
    r"(?:(?!Compiling entry function).)*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry function).)*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SHARED = re.compile(r"(\d+) bytes smem")
WARNING = re.compile(
    r"^(?:(?:\S*/)?csrc/\S*: ?warning.*|(?:\S*/)?csrc/\S*\(\d+\): warning.*"
    r"|(?:ptxas|nvlink)[^\n]* warning\s*:.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Stored and loaded, of a thread."""
    shared_bytes: int
    """Static, of a block."""


def kernels(log: str) -> list[Kernel]:
    """Find every kernel of the architecture, by name."""
    found = {
        match["name"]: Kernel(
            name=match["name"],
            registers=int(match["registers"]),
            spilled_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=sum(map(int, SHARED.findall(match["rest"]))),
        )
        for match in KERNEL.finditer(log)
        if match["architecture"] == ARCHITECTURE
    }
    return [found[name] for name in sorted(found)]


def warnings(log: str) -> list[str]:
    """Find the warnings about our own sources, each once."""
    return list(dict.fromkeys(WARNING.findall(log)))


def plain_names(names: Sequence[str]) -> list[str]:
    """Write names as C++ has them, where there is a tool for that."""
    if shutil.which("c++filt") is None or not names:
        return list(names)
    told = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return told.stdout.splitlines()


def main(path: str) -> int:
    """Print a line for each kernel; 1 where the build is refused."""
    log = Path(path).read_text("utf-8", errors="replace")
    built, raised = kernels(log), warnings(log)
    for kernel, name in zip(built, plain_names([one.name for one in built]), strict=True):
        print(
            f"{kernel.registers:>4} registers {kernel.spilled_bytes:>5} bytes spilled "
            f"{kernel.shared_bytes:>6} bytes shared  {name}"
        )
    problems = [f"{kernel.name} spills" for kernel in built if kernel.spilled_bytes] + raised
    if not built:
        problems.append(f"{path} names no kernel for {ARCHITECTURE}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
