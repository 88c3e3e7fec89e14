"""Claim: the compiled SwiGLU moves every number once, and takes less time than its peers.

Forward, and forward with backward, at the published feed-forward widths. Useful traffic: forward
reads 2F and writes F numbers a token; the backward reads 3F and writes 2F.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.flags import a_count
from benchmarks.frame import contest, machine
from benchmarks.frame.contest import Case, Contest, Entrant, Step
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import parser
from megatron_mlr1.ending import clean_exit

STEM = "swiglu"
WIDTHS = (2048, 4096, 6144)
"""Feed-forward widths of the 140M, 360M and 950M."""
TOKENS = {"cpu": 1024, "cuda": 32768}
FORWARD, BOTH = "forward", "forward + backward"
NUMBERS = {FORWARD: 3, BOTH: 8}
"""Times F numbers of a token that are moved."""


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    made = parser(__doc__, STEM)
    made.add_argument("--widths", type=a_count, nargs="+", default=WIDTHS)
    made.add_argument("--tokens", type=a_count, default=TOKENS[machine.device()])
    options = made.parse_args()
    cases = [
        case(width, options.tokens, part) for width in options.widths for part in (FORWARD, BOTH)
    ]
    contest.hold(CONTEST, cases, save=options.save)


def case(width: int, tokens: int, part: str) -> Case:
    """Describe one size."""
    size = contest.dtype_here().itemsize
    return Case(
        cells=(f"{width}", f"{tokens}", part),
        tokens=tokens,
        width=width,
        work=Work(bytes=NUMBERS[part] * width * tokens * size),
        part=part,
    )


def prepared(case: Case, function: Callable[[Tensor], Tensor]) -> Step:
    """Make the inputs, and give the pass that the case names."""
    x = contest.random(case.tokens, 2 * case.width, grad=True)
    grad = contest.random(case.tokens, case.width)
    if case.part == FORWARD:
        return lambda: function(x.detach())
    return lambda: torch.autograd.grad(function(x), x, grad)


def mlr1(case: Case) -> Step:
    """Ours."""
    from megatron_mlr1.ops.swiglu import swiglu

    return prepared(case, lambda x: swiglu(x, kernel="mlr1"))


def plain(case: Case) -> Step:
    """Three calls of torch."""

    def three(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return prepared(case, three)


def megatron(case: Case) -> Step:
    """The engine's function, compiled by torch."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return prepared(case, lambda x: bias_swiglu_impl(x, None))


def transformer_engine(case: Case) -> Step:
    """Transformer Engine's activation, as its operation of that name."""
    from transformer_engine.pytorch.ops import SwiGLU

    return prepared(case, SwiGLU())


def liger(case: Case) -> Step:
    """Liger's function of a fused projection, which copies no halves."""
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return prepared(case, LigerFusedGateUpSiLUMulFunction.apply)


CONTEST = Contest(
    stem=STEM,
    title="SwiGLU",
    about="[gate | up] to silu(gate) * up, bf16 on a GPU and fp32 on a CPU.",
    columns=(">F", ">tokens", "pass"),
    rate="GB/s",
    entrants=(
        Entrant(name="mlr1", prepare=mlr1),
        Entrant(name="torch: chunk, silu, multiply", prepare=plain),
        Entrant(
            name="Megatron-Core: bias_swiglu_impl",
            prepare=megatron,
            needs=("megatron.core", "megatron-core"),
        ),
        Entrant(
            name="Transformer Engine: SwiGLU",
            prepare=transformer_engine,
            needs=("transformer_engine", "transformer-engine"),
        ),
        Entrant(
            name="Liger: LigerFusedGateUpSiLUMulFunction",
            prepare=liger,
            needs=("liger_kernel", "liger-kernel"),
        ),
    ),
)


if __name__ == "__main__":
    with clean_exit():
        main()
