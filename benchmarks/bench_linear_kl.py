"""Claim: distillation of two fused heads takes less memory than its peers, and no more time.

Value and both gradients of cross-entropy and forward KL in one, at the published widths of the
student and a teacher of width 4,096, over 128,256 ids. The row of the four products alone is what
cuBLAS takes (on a CPU: torch's library).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.flags import a_count
from benchmarks.frame import contest, machine
from benchmarks.frame.contest import Case, Contest, Entrant, Step
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import parser
from megatron_mlr1.ending import clean_exit

STEM = "linear_kl"
VOCABULARY = 128_256
TEACHER_WIDTH = 4096
ALPHA = 0.5
WIDTHS = {"cpu": (576, 1536), "cuda": (1536, 576, 1024)}
TOKENS = {"cpu": (768,), "cuda": (16384, 4096)}
PRODUCT_ROWS = 8192
"""Tokens of one of the products that are measured alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What every implementation gets."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def clear(self) -> None:
        """Forget the gradients of the last step."""
        self.hidden.grad = self.weight.grad = None


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    made = parser(__doc__, STEM)
    made.add_argument("--widths", type=a_count, nargs="+", default=WIDTHS[machine.device()])
    made.add_argument("--tokens", type=a_count, nargs="+", default=TOKENS[machine.device()])
    options = made.parse_args()
    cases = [case(width, tokens) for tokens in options.tokens for width in options.widths]
    contest.hold(CONTEST, cases, save=options.save)


def case(width: int, tokens: int) -> Case:
    """Describe one size: three products of the student and one of the teacher.

    Hidden states and head of the student are read and their gradients written; the teacher's are
    read.
    """
    size = contest.dtype_here().itemsize
    return Case(
        cells=(f"{width}", f"{tokens}"),
        tokens=tokens,
        width=width,
        work=Work(
            flops=2 * (3 * width + TEACHER_WIDTH) * VOCABULARY * tokens,
            bytes=(2 * width + TEACHER_WIDTH) * (tokens + VOCABULARY) * size,
        ),
    )


def inputs(case: Case) -> Inputs:
    """Make both models' hidden states and heads, with logits that spread by about 2."""
    return Inputs(
        hidden=contest.random(case.tokens, case.width, grad=True),
        weight=contest.random(VOCABULARY, case.width, std=2 / case.width**0.5, grad=True),
        teacher_hidden=contest.random(case.tokens, TEACHER_WIDTH),
        teacher_weight=contest.random(VOCABULARY, TEACHER_WIDTH, std=2 / TEACHER_WIDTH**0.5),
        labels=torch.randint(0, VOCABULARY, (case.tokens,), device=machine.device()),
    )


def mlr1(case: Case, logits: torch.dtype | None = None) -> Step:
    """Ours, as the loss head calls it: the head's gradient is added to an fp32 buffer."""
    from megatron_mlr1.losses.distillation import HiddenTargets, Lesson, distillation_loss
    from megatron_mlr1.losses.language_model import counted_rows
    from megatron_mlr1.losses.vocab_parallel import Foreseen, TensorParallel
    from megatron_mlr1.ops.head_chunks import Chunks
    from megatron_mlr1.ops.linear_kl import Head

    made = inputs(case)
    mask = torch.ones_like(made.labels)
    main_grad = torch.zeros_like(made.weight, dtype=torch.float32)
    one = torch.ones((), device=made.hidden.device)

    def step() -> None:
        made.clear()
        distillation_loss(
            Head(hidden=made.hidden, weight=made.weight),
            Lesson(targets=HiddenTargets(hidden=made.teacher_hidden), alpha=ALPHA),
            made.labels,
            mask,
            teacher_weight=made.teacher_weight,
            parallel=TensorParallel(group=None, num_ids=VOCABULARY),
            chunks=Chunks(rows=counted_rows(mask), logits=logits),
            deliver=Foreseen(factor=one, into=main_grad, arrived=lambda _: None),
        ).total.backward()

    return step


def mlr1_bf16(case: Case) -> Step:
    """Ours with its logits kept in bf16, as with --mlr1-logits bf16."""
    return mlr1(case, torch.bfloat16)


def products(case: Case) -> Step:
    """The four products alone, in chunks of tokens as a fused loss needs them."""
    made = inputs(case)
    hidden, weight = made.hidden.detach(), made.weight.detach()
    rows = min(PRODUCT_ROWS, case.tokens)
    logits, teacher_logits = (hidden.new_empty(rows, VOCABULARY) for _ in range(2))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    chunks = [
        (begin, slice(begin, min(begin + rows, case.tokens)))
        for begin in range(0, case.tokens, rows)
    ]

    def step() -> None:
        for begin, place in chunks:
            part, teacher_part = hidden[place], made.teacher_hidden[place]
            out = logits[: len(part)]
            torch.mm(teacher_part, made.teacher_weight.t(), out=teacher_logits[: len(part)])
            torch.mm(part, weight.t(), out=out)
            torch.mm(out, weight, out=grad_hidden[place])
            torch.addmm(grad_weight, out.t(), part, beta=int(begin > 0), out=grad_weight)

    return step


def plain(case: Case) -> Step:
    """torch's two products, two log-softmaxes and their divergence."""
    made = inputs(case)

    def step() -> None:
        made.clear()
        student = functional.linear(made.hidden, made.weight).float().log_softmax(1)
        teacher = functional.linear(made.teacher_hidden, made.teacher_weight).float().log_softmax(1)
        kd = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        ce = functional.nll_loss(student, made.labels, reduction="sum")
        (ALPHA * kd + (1 - ALPHA) * ce).backward()

    return step


def liger(case: Case) -> Step:
    """Liger's chunked distillation loss, with beta 0: the forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    made = inputs(case)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0, compiled=True
    )

    def step() -> None:
        made.clear()
        answer = loss(
            made.hidden, made.weight, made.teacher_hidden, made.teacher_weight, made.labels
        )
        answer.backward()

    return step


CONTEST = Contest(
    stem=STEM,
    title="Two linear heads, cross-entropy and forward KL",
    about=f"{VOCABULARY:,} ids, a teacher of width {TEACHER_WIDTH:,}, bf16 on a GPU and fp32 on "
    "a CPU; forward and backward.",
    columns=(">width", ">tokens"),
    rate="TFLOP/s",
    entrants=(
        Entrant(name="mlr1", prepare=mlr1),
        Entrant(name="mlr1, --mlr1-logits bf16", prepare=mlr1_bf16),
        Entrant(name="the four products alone", prepare=products),
        Entrant(name="torch: linear, log_softmax, kl_div", prepare=plain),
        Entrant(
            name="Liger: LigerFusedLinearJSDLoss",
            prepare=liger,
            needs=("liger_kernel", "liger-kernel"),
        ),
    ),
    notes=(
        "mlr1 includes the metrics of the log: entropy, agreement, head and tail of the "
        "divergence, and adds the gradient of the head to the engine's fp32 buffer, which is no "
        "part of its peak. quack has no distillation of two heads.",
    ),
)


if __name__ == "__main__":
    with clean_exit():
        main()
