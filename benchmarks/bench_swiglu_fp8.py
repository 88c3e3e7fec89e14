"""Claim: SwiGLU that writes FP8 itself takes less time than SwiGLU and then a cast.

By rows, and by rows and columns, as a linear layer in FP8 wants its input on Hopper. Useful
traffic: 2F numbers a token are read, and F or 2F bytes written.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.flags import a_count
from benchmarks.frame import contest, machine
from benchmarks.frame.contest import Case, Contest, Entrant, Step
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import parser
from megatron_mlr1.ending import clean_exit

STEM = "swiglu_fp8"
WIDTHS = (2048, 4096, 6144)
"""Feed-forward widths of the 140M, 360M and 950M."""
TOKENS = {"cpu": 1024, "cuda": 32768}
ROWS, BOTH = "rows", "rows + columns"
COPIES = {ROWS: 1, BOTH: 2}
SCALE = 16.0


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    made = parser(__doc__, STEM)
    made.add_argument("--widths", type=a_count, nargs="+", default=WIDTHS)
    made.add_argument("--tokens", type=a_count, default=TOKENS[machine.device()])
    options = made.parse_args()
    cases = [case(width, options.tokens, part) for width in options.widths for part in COPIES]
    contest.hold(CONTEST, cases, save=options.save)


def case(width: int, tokens: int, part: str) -> Case:
    """Describe one size."""
    size = 2 * contest.dtype_here().itemsize + COPIES[part]
    return Case(
        cells=(f"{width}", f"{tokens}", part),
        tokens=tokens,
        width=width,
        work=Work(bytes=size * width * tokens),
        part=part,
    )


def prepared(case: Case, function: Callable[[Tensor, Tensor, Tensor], object]) -> Step:
    """Make the inputs: [gate | up], a scale and an amax."""
    x = contest.random(case.tokens, 2 * case.width)
    scale = torch.full((1,), SCALE, device=x.device)
    amax = torch.zeros(1, device=x.device)
    return lambda: function(x, scale, amax)


def mlr1(case: Case) -> Step:
    """Ours, in one pass."""
    from megatron_mlr1.ops.swiglu_fp8 import swiglu_fp8

    return prepared(
        case, lambda x, scale, amax: swiglu_fp8(x, scale, amax, transpose=case.part == BOTH)
    )


def by_torch(case: Case) -> Step:
    """Our SwiGLU, and torch's operations behind it."""
    from megatron_mlr1.ops.swiglu import swiglu

    def steps(x: Tensor, scale: Tensor, amax: Tensor) -> object:
        stored = swiglu(x, kernel="mlr1")
        torch.maximum(amax, stored.abs().amax(), out=amax)
        out = (stored * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
        return (out, out.t().contiguous()) if case.part == BOTH else out

    return prepared(case, steps)


def transformer_engine(case: Case) -> Step:
    """Our SwiGLU, and Transformer Engine's cast behind it: what a layer does without the op."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    from megatron_mlr1.ops.swiglu import swiglu

    e4m3 = TE_DType[torch.float8_e4m3fn]

    def steps(x: Tensor, scale: Tensor, amax: Tensor) -> object:
        cast = Float8Quantizer(scale, amax, e4m3, rowwise=True, columnwise=case.part == BOTH)
        return cast(swiglu(x, kernel="mlr1"))

    return prepared(case, steps)


CONTEST = Contest(
    stem=STEM,
    title="SwiGLU with FP8 output",
    about="[gate | up] to E4M3 of silu(gate) * up * scale, and its amax; from bf16 on a GPU and "
    "from fp32 on a CPU.",
    columns=(">F", ">tokens", "written"),
    rate="GB/s",
    entrants=(
        Entrant(name="mlr1: one pass", prepare=mlr1),
        Entrant(name="mlr1, then torch's cast", prepare=by_torch),
        Entrant(
            name="mlr1, then Transformer Engine's cast",
            prepare=transformer_engine,
            needs=("transformer_engine", "transformer-engine"),
        ),
    ),
)


if __name__ == "__main__":
    with clean_exit():
        main()
