"""Runs of `megatron_mlr1.train` with Transformer Engine's layers on the CPU.

    python -m tests.support.te_on_cpu PLAN.json

Its Python is the real one, from SOURCES (`make te-sources`); its kernels are those of `te_kernels`.
PLAN is a list of {"words": [...], "log": FILE, "ranks": N}: the runs, one after the other, each
in processes that are forked from this one, which has loaded everything. Each leaves LOG.calls, how
often its first rank called each kernel.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.ranks import free_port

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "build/transformer_engine"
VERSION = "2.18.0"
ATTENTION = ("--attention-backend", "unfused")
"""That of plain torch; the others are kernels."""


def load() -> None:
    """Import Transformer Engine and the engine in CPU mode, on a device that says it is an H100."""
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]  # of a run before, in the process that this one was started by
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}
    # No search for its compiled half and for CUDA's libraries.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    import torch

    from megatron_mlr1 import cpu
    from megatron_mlr1.model import precision
    from tests.support import te_kernels

    torch.set_num_threads(1)
    cpu.activate()
    _be_an_h100()
    del sys.modules["transformer_engine"]
    sys.path.append(str(SOURCES))
    sys.modules["transformer_engine_torch"] = te_kernels.module()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _: None
    import transformer_engine.pytorch

    precision.transformer_engine_version = lambda: VERSION  # type: ignore[assignment]
    from megatron_mlr1.engine import fp8, machine

    device = fp8.Device(name="NVIDIA H100", capability=(9, 0), cuda=(13, 0))
    machine._device = lambda: device
    import megatron_mlr1.engine.run  # noqa: F401


def _be_an_h100() -> None:
    import torch

    from megatron_mlr1 import cpu

    class CurrentDevice(cpu._Answer):
        def __call__(self, *_: Any, **__: Any) -> Any:
            # Where it makes a tensor, and not a name.
            return torch.device("cpu") if _asked_by("transformer_engine.pytorch.quan") else 0

    def is_cuda(_: torch.Tensor) -> bool:
        return _asked_by("transformer_engine", "megatron_mlr1.model.fp8_activation")

    capability = (9, 0)
    torch.cuda.get_device_capability = cpu._Answer(capability)
    properties = torch.cuda.get_device_properties(0)
    properties.major, properties.minor = capability
    torch.cuda.current_device = CurrentDevice(0)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(is_cuda)  # type: ignore[assignment]


def _asked_by(*modules: str) -> bool:
    name: str = sys._getframe(2).f_globals.get("__name__", "")
    return name.startswith(modules)


def run(words: list[str], log: Path, ranks: int) -> int:
    """Train in processes of their own; give the largest exit code."""
    port = free_port()
    children = [_fork(partial(_rank, words, log, rank, ranks, port)) for rank in range(ranks)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _fork(work: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def _rank(words: list[str], log: Path, rank: int, ranks: int, port: int) -> int:
    from megatron_mlr1.train import main
    from tests.support import te_kernels

    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv[:] = ["train", "--transformer-impl", "transformer_engine", *ATTENTION, *words]
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # the engine's, at --exit-interval
        code = int(end.code or 0)
    if rank == 0:
        log.with_suffix(".calls").write_text(json.dumps(te_kernels.CALLS))
    return code


def runs(plan: Path) -> int:
    """Do all runs of a plan; give the largest exit code."""
    load()
    entries = json.loads(plan.read_text())
    return max(run(one["words"], Path(one["log"]), one["ranks"]) for one in entries)


if __name__ == "__main__":
    sys.exit(runs(Path(sys.argv[1])))
