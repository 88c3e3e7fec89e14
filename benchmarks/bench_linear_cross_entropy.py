"""Claim: the fused head and cross-entropy take less memory than their peers, and no more time.

Value and both gradients of one loss at the published widths over 128,256 ids. The row of the three
products alone is what cuBLAS takes (on a CPU: torch's library): no loss can be faster that does not
leave products out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, distributed
from torch.nn import functional

from benchmarks.flags import a_count
from benchmarks.frame import contest, machine
from benchmarks.frame.contest import Case, Contest, Entrant, Step
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import parser
from megatron_mlr1.ending import clean_exit
from megatron_mlr1.ops import libraries

STEM = "linear_cross_entropy"
VOCABULARY = 128_256
WIDTHS = {"cpu": (576, 1536), "cuda": (1536, 576, 1024)}
TOKENS = {"cpu": (1024,), "cuda": (32768, 4096)}
PRODUCT_ROWS = 8192
"""Tokens of one of the products that are measured alone; their logits are 2.1 GB in bf16."""


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    made = parser(__doc__, STEM)
    made.add_argument("--widths", type=a_count, nargs="+", default=WIDTHS[machine.device()])
    made.add_argument("--tokens", type=a_count, nargs="+", default=TOKENS[machine.device()])
    options = made.parse_args()
    cases = [case(width, tokens) for tokens in options.tokens for width in options.widths]
    contest.hold(CONTEST, cases, save=options.save)


def case(width: int, tokens: int) -> Case:
    """Describe one size: three products; hidden states, head and their gradients moved once."""
    size = contest.dtype_here().itemsize
    moved = 2 * width * (tokens + VOCABULARY) * size
    return Case(
        cells=(f"{width}", f"{tokens}"),
        tokens=tokens,
        width=width,
        work=Work(flops=6 * width * VOCABULARY * tokens, bytes=moved),
    )


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states, head and labels."""
    hidden = contest.random(case.tokens, case.width, grad=True)
    weight = contest.random(VOCABULARY, case.width, std=0.02, grad=True)
    labels = torch.randint(0, VOCABULARY, (case.tokens,), device=machine.device())
    return hidden, weight, labels


def mlr1(case: Case, logits: torch.dtype | None = None) -> Step:
    """Ours, as the loss head calls it: the head's gradient is added to an fp32 buffer."""
    from megatron_mlr1.losses.language_model import counted_rows, linear_language_model_loss
    from megatron_mlr1.losses.vocab_parallel import Foreseen, TensorParallel
    from megatron_mlr1.ops.head_chunks import Chunks

    hidden, weight, labels = inputs(case)
    mask = torch.ones_like(labels)
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    one = torch.ones((), device=hidden.device)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_language_model_loss(
            hidden,
            weight,
            labels,
            mask,
            parallel=TensorParallel(group=None, num_ids=VOCABULARY),
            chunks=Chunks(rows=counted_rows(mask), logits=logits),
            deliver=Foreseen(factor=one, into=main_grad, arrived=lambda _: None),
        ).total.backward()

    return step


def mlr1_bf16(case: Case) -> Step:
    """Ours with its logits kept in bf16, as with --mlr1-logits bf16."""
    return mlr1(case, torch.bfloat16)


def products(case: Case) -> Step:
    """The three products alone, in chunks of tokens as a fused loss needs them."""
    hidden, weight, _ = (tensor.detach() for tensor in inputs(case))
    parts = hidden.split(PRODUCT_ROWS)
    logits = hidden.new_empty(min(PRODUCT_ROWS, case.tokens), VOCABULARY)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    grad_parts = grad_hidden.split(PRODUCT_ROWS)

    def step() -> None:
        for number, (part, grad_part) in enumerate(zip(parts, grad_parts, strict=True)):
            out = logits[: len(part)]
            torch.mm(part, weight.t(), out=out)
            torch.mm(out, weight, out=grad_part)
            torch.addmm(grad_weight, out.t(), part, beta=int(number > 0), out=grad_weight)

    return step


def plain(case: Case) -> Step:
    """torch's product and cross-entropy, in fp32 behind the product as the engine has it."""
    hidden, weight, labels = inputs(case)

    def step() -> None:
        hidden.grad = weight.grad = None
        logits = functional.linear(hidden, weight)
        functional.cross_entropy(logits.float(), labels, reduction="sum").backward()

    return step


def megatron(case: Case) -> Step:
    """The engine's native fused cross-entropy behind a product."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from torch._C._distributed_c10d import HashStore

    hidden, weight, labels = inputs(case)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD

    def step() -> None:
        hidden.grad = weight.grad = None
        logits = functional.linear(hidden, weight)[:, None]
        fused_vocab_parallel_cross_entropy(logits, labels[:, None], group).sum().backward()

    return step


def library(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """One of the libraries that --mlr1-kernels can choose, called as there."""
    hidden, weight, labels = inputs(case)

    def step() -> None:
        hidden.grad = weight.grad = None
        function(hidden, weight, labels).backward()

    return step


def liger(case: Case) -> Step:
    """Liger's fused linear cross-entropy."""
    return library(case, libraries.liger_cross_entropy)


def liger_large(case: Case) -> Step:
    """The same in chunks of `PRODUCT_ROWS` tokens, where its own have the hidden states' size."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        words = libraries.liger_cross_entropy_words(hidden, weight, labels)
        # Behind them: token scaling, accuracy, predictions, implementation, mode; then how many
        # times the memory of the hidden states a chunk of logits may take.
        times = max(PRODUCT_ROWS * VOCABULARY // hidden.numel(), 1)
        settings = (False, False, False, None, None, times)
        total: Tensor = LigerFusedLinearCrossEntropyFunction.apply(*words, *settings)[0]
        return total

    return library(case, function)


def quack(case: Case) -> Step:
    """The chunked linear cross-entropy of quack."""
    return library(case, libraries.quack_cross_entropy)


CONTEST = Contest(
    stem=STEM,
    title="Linear head and cross-entropy",
    about=f"{VOCABULARY:,} ids, bf16 on a GPU and fp32 on a CPU; forward and backward.",
    columns=(">width", ">tokens"),
    rate="TFLOP/s",
    entrants=(
        Entrant(name="mlr1", prepare=mlr1),
        Entrant(name="mlr1, --mlr1-logits bf16", prepare=mlr1_bf16),
        Entrant(name="the three products alone", prepare=products),
        Entrant(name="torch: linear, cross_entropy", prepare=plain),
        Entrant(
            name="Megatron-Core: linear, native fused cross-entropy",
            prepare=megatron,
            needs=("megatron.core", "megatron-core"),
        ),
        Entrant(
            name="Liger: fused linear cross-entropy",
            prepare=liger,
            needs=("liger_kernel", "liger-kernel"),
        ),
        Entrant(
            name="Liger: the same, chunks of 8,192 tokens",
            prepare=liger_large,
            needs=("liger_kernel", "liger-kernel"),
        ),
        Entrant(
            name="quack: chunked linear cross-entropy",
            prepare=quack,
            needs=("quack", "quack-kernels"),
        ),
    ),
    notes=(
        "mlr1 includes the tokens' compaction, and adds the gradient of the head to the engine's "
        "fp32 buffer, which is no part of its peak. The products alone, and the others, write it "
        "in the type of the head. What keeps whole logits grows with the tokens in memory; mlr1 "
        "does not.",
    ),
)


if __name__ == "__main__":
    with clean_exit():
        main()
