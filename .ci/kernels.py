"""Judge the log of a build: registers, spills and shared memory of each kernel for Hopper.

Ends with an error where a kernel spills registers, keeps an array in local memory or has no launch
bounds, where our own sources or ptxas raise a warning, or where the log names no kernel. Shared
memory is the static part; what a launch adds is not known to the compiler.
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
    r"(?P<stack>\d+) bytes stack frame, "
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
CSRC = Path(__file__).parents[1] / "csrc"
UNBOUNDED = re.compile(r"__global__ void\s+(?!__launch_bounds__)(\w+)")
"""A kernel without launch bounds: ptxas gives it up to 255 registers a thread, with which blocks of
more than 256 threads cannot be launched."""
LOCAL_ARRAYS = ("qk_norm_rope",)
"""Parts of the names of kernels that may keep an array in local memory: sine and cosine of angles
beyond 100,000, which no position reaches, are reduced by a table of digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Stored and loaded, of a thread."""
    local_bytes: int
    """In local memory, of a thread: spills, and arrays that are indexed by what only runs know."""
    shared_bytes: int
    """Static, of a block."""


def kernels(log: str) -> list[Kernel]:
    """Find every kernel of the architecture, by name."""
    found = {
        match["name"]: Kernel(
            name=match["name"],
            registers=int(match["registers"]),
            spilled_bytes=int(match["stores"]) + int(match["loads"]),
            local_bytes=int(match["stack"]),
            shared_bytes=sum(map(int, SHARED.findall(match["rest"]))),
        )
        for match in KERNEL.finditer(log)
        if match["architecture"] == ARCHITECTURE
    }
    return [found[name] for name in sorted(found)]


def warnings(log: str) -> list[str]:
    """Find the warnings about our own sources, each once."""
    return list(dict.fromkeys(WARNING.findall(log)))


def faults(kernel: Kernel) -> list[str]:
    """Say what a kernel is refused for."""
    if kernel.spilled_bytes:
        return [f"{kernel.name} spills"]
    if kernel.local_bytes and not any(part in kernel.name for part in LOCAL_ARRAYS):
        return [f"{kernel.name} keeps an array of {kernel.local_bytes} bytes in local memory"]
    return []


def unbounded(sources: Path) -> list[str]:
    """Find the kernels in sources that have no launch bounds."""
    return [
        f"{path.name}: {name} has no __launch_bounds__"
        for path in sorted(sources.glob("*.cu*"))
        for name in UNBOUNDED.findall(path.read_text("utf-8"))
    ]


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
    problems = [fault for kernel in built for fault in faults(kernel)] + raised + unbounded(CSRC)
    if not built:
        problems.append(f"{path} names no kernel for {ARCHITECTURE}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
