"""Claim: one op takes a fused QKV apart, norms and rotates it in less time than the engine's calls.

Forward, and forward with backward, at the published heads, of whole sequences and of packed
documents. Useful traffic: forward reads and writes a fused row; backward reads the gradients and
what was turned, and writes the row's gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import a_count
from benchmarks.frame import contest, machine
from benchmarks.frame.contest import Case, Contest, Entrant, Step
from benchmarks.frame.roofline import Work
from benchmarks.frame.table import parser
from megatron_mlr1 import cpu
from megatron_mlr1.ending import clean_exit

STEM = "qk_norm_rope"
GROUPS = {9: 3, 16: 4, 24: 6}
"""Heads of keys and values, by those of queries: the 140M, 360M and 950M."""
WIDTH = 64
"""Numbers of a head."""
EPS = 1e-5
TOKENS = {"cpu": 512, "cuda": 32768}
SEQUENCES = {"cpu": 2, "cuda": 16}
DOCUMENT = 128
"""Tokens of each packed document."""
WHOLE, PACKED = "whole", "packed"
FORWARD, BOTH = "forward", "forward + backward"

Parts = tuple[Tensor, Tensor, Tensor]
Split = Callable[[Tensor], Parts]


def main() -> None:
    """Measure on the GPU where there is one, else on the CPU."""
    made = parser(__doc__, STEM)
    made.add_argument(
        "--heads", type=a_count, nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS)
    )
    made.add_argument("--tokens", type=a_count, default=TOKENS[machine.device()])
    options = made.parse_args()
    cases = [
        case(heads, options.tokens, layout, part)
        for heads in options.heads
        for layout in (WHOLE, PACKED)
        for part in (FORWARD, BOTH)
    ]
    contest.hold(CONTEST, cases, save=options.save)


def case(heads: int, tokens: int, layout: str, part: str) -> Case:
    """Describe one size; its width is the number of query heads."""
    groups = GROUPS[heads]
    row = (heads + 2 * groups) * WIDTH * contest.dtype_here().itemsize
    # The backward reads Q and K again, of which a row has all but the values.
    times = 2 if part == FORWARD else 5 - groups / (heads + 2 * groups)
    return Case(
        cells=(f"{heads} / {groups}", f"{tokens}", layout, part),
        tokens=tokens,
        width=heads,
        work=Work(bytes=times * row * tokens),
        part=f"{layout}: {part}",
    )


class Inputs:
    """What every implementation gets of a case."""

    def __init__(self, case: Case) -> None:
        self.heads, self.groups = case.width, GROUPS[case.width]
        device = machine.device()
        packed = case.part.startswith(PACKED)
        sequences = min(SEQUENCES[device], case.tokens)
        positions = case.tokens // sequences
        self.leading = (case.tokens, 1) if packed else (positions, sequences)
        frequencies = 1 / 500_000 ** (torch.arange(0, WIDTH, 2, device=device) / WIDTH)
        length = DOCUMENT if packed else positions
        angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
        # The engine's embedding: each angle twice.
        self.embedding = angles.repeat_interleave(2, dim=1)[:, None, None]
        self.bounds = None
        if packed:
            ends = [*range(DOCUMENT, case.tokens, DOCUMENT), case.tokens]
            self.bounds = torch.tensor([0, *ends], device=device, dtype=torch.int32)

    def step(self, case: Case, split: Split) -> Step:
        """Give the pass that the case names."""
        columns = (self.heads + 2 * self.groups) * WIDTH
        x = contest.random(*self.leading, columns, grad=True)
        grads = [
            contest.random(*self.leading, count, WIDTH)
            for count in (self.heads, self.groups, self.groups)
        ]
        if case.part.endswith(BOTH):
            return lambda: torch.autograd.grad(split(x), x, grads)
        return lambda: split(x.detach())


def mlr1(case: Case) -> Step:
    """Ours."""
    from megatron_mlr1.ops.qk_norm_rope import qk_norm_rope

    inputs = Inputs(case)
    angles = inputs.embedding[:, 0, 0, ::2]

    def split(qkv: Tensor) -> Parts:
        return qk_norm_rope(qkv, angles, num_groups=inputs.groups, eps=EPS, bounds=inputs.bounds)

    return inputs.step(case, split)


def megatron(case: Case) -> Step:
    """What the engine's attention does between its projection and its core, by torch."""
    inputs = Inputs(case)
    if machine.device() == "cpu":
        cpu.activate()  # for the engine's functions
    from megatron.core.models.common.embeddings import rope_utils

    def rotate(x: Tensor) -> Tensor:
        if inputs.bounds is None:
            return rope_utils._apply_rotary_pos_emb_bshd(x, inputs.embedding, True)  # type: ignore[no-any-return]
        return rope_utils._apply_rotary_pos_emb_thd(  # type: ignore[no-any-return]
            x, inputs.bounds, inputs.embedding, True, cp_group=OneRank()
        )

    return inputs.step(case, engine(inputs, rotate))


def transformer_engine(case: Case) -> Step:
    """The same with Transformer Engine's rotation, which the engine takes where it is."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    inputs = Inputs(case)
    words: dict[str, Any] = {
        "tensor_format": "sbhd" if inputs.bounds is None else "thd",
        "fused": True,
        "interleaved": True,
        "cu_seqlens": inputs.bounds,
    }

    def rotate(x: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(x, inputs.embedding, **words)
        return rotated

    return inputs.step(case, engine(inputs, rotate))


def engine(inputs: Inputs, rotate: Callable[[Tensor], Tensor]) -> Split:
    """Give the engine's split and norm, with a rotation."""
    from megatron.core.transformer.torch_norm import L2Norm

    heads, groups = inputs.heads, inputs.groups
    norm = L2Norm(WIDTH, EPS)

    def split(qkv: Tensor) -> Parts:
        grouped = qkv.view(*qkv.shape[:2], groups, -1)
        q, k, v = torch.split(grouped, [heads // groups * WIDTH, WIDTH, WIDTH], dim=3)
        q, k = norm(q.reshape(*qkv.shape[:2], heads, WIDTH)), norm(k)
        if inputs.bounds is None:
            return rotate(q), rotate(k), v
        return rotate(q.squeeze(1)).unsqueeze(1), rotate(k.squeeze(1)).unsqueeze(1), v

    return split


class OneRank:
    """A process group of one, as far as the engine's rotation asks for it."""

    def size(self) -> int:
        """Number of ranks."""
        return 1

    def rank(self) -> int:
        """Number of this one."""
        return 0


CONTEST = Contest(
    stem=STEM,
    title="Split, norm and rotation of a fused QKV",
    about=f"Heads of {WIDTH}, bf16 on a GPU and fp32 on a CPU; packed documents of {DOCUMENT} "
    "tokens.",
    columns=("heads / groups", ">tokens", "documents", "pass"),
    rate="GB/s",
    entrants=(
        Entrant(name="mlr1", prepare=mlr1),
        Entrant(name="Megatron-Core", prepare=megatron),
        Entrant(
            name="Megatron-Core, Transformer Engine's rotation",
            prepare=transformer_engine,
            needs=("transformer_engine", "transformer-engine"),
        ),
    ),
)


if __name__ == "__main__":
    with clean_exit():
        main()
