"""How many replicas a run needs and what the network carries: arithmetic, before GPUs are bought.

For each token, of a model with P weights in its layers, L layers of h heads of width w, vocabulary
V, hidden size d and sequences of S tokens:

    forward  = 2 P + 2 S h w L + 2 V d     products, causal attention (half of S on average), head
    student  = 3 forward                   the backward pass costs two forwards
    teacher  = forward without its head, unless it makes sparse targets

(The 3 and the 2: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.) A device does its peak times
an efficiency. The efficiencies are estimates; measure yours and give them.
"""

import json
from dataclasses import astuple, dataclass
from math import isfinite
from pathlib import Path
from typing import Final

from megatron_mlr1.errors import ConfigError, TeacherError
from megatron_mlr1.recipes import sheet
from megatron_mlr1.teacher.spec import TargetSpec, TeacherIdentity, bytes_per_token

PEAK_TFLOPS: Final = 989.0
"""Dense bf16 of one H100 SXM: NVIDIA's H100 data sheet, without sparsity."""
STUDENT_EFFICIENCY: Final = 0.396
"""Estimate: 60,000 tokens/s of the 950M student on one H100."""
TEACHER_EFFICIENCY: Final = 0.60
"""Estimate: forward alone, long sequences, no cache."""
GPUS_PER_NODE: Final = 8
LOOKAHEAD: Final = 8
"""Micro-batches that a student asks for ahead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What decides a model's cost."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_width: int
    vocab_size: int

    def forward_flops(self, sequence: int, *, with_head: bool) -> float:
        """Floating-point operations of one token's forward pass."""
        attention_width = self.num_heads * self.head_width
        attention = 2 * self.hidden_size * (attention_width + self.num_groups * self.head_width)
        weights = self.num_layers * (attention + 3 * self.hidden_size * self.ffn_hidden_size)
        head = 2 * self.vocab_size * self.hidden_size if with_head else 0
        return 2 * weights + 2 * sequence * attention_width * self.num_layers + head


LLAMA_31_8B: Final = Shape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_heads=32,
    num_groups=8,
    head_width=128,
    vocab_size=128256,
)
"""config.json of meta-llama/Llama-3.1-8B-Instruct."""


HIDDEN: Final = TargetSpec()
"""Exact targets, the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What to plan for."""

    model: str
    """A packaged model: the student."""
    student_gpus: int
    replicas: int | None = None
    """Replicas there are; None plans for no wait."""
    teacher: Shape = LLAMA_31_8B
    spec: TargetSpec = HIDDEN
    stage: str = "midtrain_phase1"
    """Gives sequence length and micro batch."""
    student_tokens_per_s: float | None = None
    """Measured on one GPU; None estimates it."""
    teacher_tokens_per_s: float | None = None
    """Measured on one GPU; None estimates it."""

    def __post_init__(self) -> None:
        if self.student_gpus < 1 or (self.replicas is not None and self.replicas < 1):
            raise ConfigError(
                f"--student-gpus is {self.student_gpus} and --replicas is {self.replicas}; there "
                "must be at least 1 of each, or --replicas left out to plan for no wait."
            )
        for rate in (self.student_tokens_per_s, self.teacher_tokens_per_s):
            if rate is not None and not (isfinite(rate) and rate > 0):
                raise ConfigError(
                    f"{rate} tokens/s were given; a rate is above 0 and finite. Correct it."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The plan."""

    question: Question
    sequence: int
    micro_batch: int
    student_flops: float
    teacher_flops: float
    student_rate: float
    """Tokens/s of one student GPU that does not wait."""
    teacher_rate: float
    """Tokens/s of one replica."""
    token_bytes: int

    @property
    def replicas_needed(self) -> int:
        """Fewest replicas for which no student waits in the long run."""
        exact = self.question.student_gpus * self.student_rate / self.teacher_rate
        return int(-(-exact // 1))

    def wait_share(self, replicas: int) -> float:
        """Share of its time that a student waits, with so many replicas."""
        supply = replicas * self.teacher_rate / self.question.student_gpus
        return max(0.0, 1 - supply / self.student_rate)


def shape_of_model(name: str) -> Shape:
    """Read a packaged model's shape from its recipe.

    Raises:
        ConfigError: there is no such model, or its sheet has no vocabulary.
    """
    values = _numbers("models", name)
    if "vocab-size" not in values:
        raise ConfigError(
            f"model {name} takes its vocabulary from the tokenizer, so nothing can be planned for "
            "it. Plan for 140m, 360m or 950m."
        )
    return Shape(
        num_layers=values["num-layers"],
        hidden_size=values["hidden-size"],
        ffn_hidden_size=values["ffn-hidden-size"],
        num_heads=values["num-attention-heads"],
        num_groups=values["num-query-groups"],
        head_width=values["kv-channels"],
        vocab_size=values["vocab-size"],
    )


def _numbers(kind: str, name: str) -> dict[str, int]:
    flags = sheet.packaged(kind, name).flags
    return {
        flag.name: int(flag.values[0])
        for flag in flags
        if len(flag.values) == 1 and flag.values[0].isdigit()
    }


def shape_of_folder(folder: Path) -> Shape:
    """Read a teacher's shape from its `config.json`.

    Raises:
        TeacherError: it has no sizes of a dense decoder.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        heads = config["num_attention_heads"]
        shape = Shape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_heads=heads,
            num_groups=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
        )
        if not all(type(size) is int and size > 0 for size in astuple(shape)):
            raise ValueError(f"sizes are whole numbers above 0, and they are {shape}")
        return shape
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise TeacherError(
            f"{path} has no sizes of a dense decoder ({error!r}); name a Hugging Face folder by "
            "--model, or leave --model out to plan for Llama-3.1-8B."
        ) from error


def plan(question: Question) -> Answer:
    """Do the arithmetic.

    Raises:
        ConfigError: an unknown model or stage.
    """
    stage = _numbers("stages", question.stage)
    sequence = stage["seq-length"]
    student = 3 * shape_of_model(question.model).forward_flops(sequence, with_head=True)
    teacher = question.teacher.forward_flops(sequence, with_head=question.spec.is_sparse)
    peak = PEAK_TFLOPS * 1e12
    identity = TeacherIdentity(
        fingerprint="0" * 32,
        name="",
        tokenizer_sha256="",
        vocab_size=question.teacher.vocab_size,
        hidden_size=question.teacher.hidden_size,
        dtype="bfloat16",
        numerics="",
    )
    return Answer(
        question=question,
        sequence=sequence,
        micro_batch=stage["micro-batch-size"],
        student_flops=student,
        teacher_flops=teacher,
        student_rate=question.student_tokens_per_s or STUDENT_EFFICIENCY * peak / student,
        teacher_rate=question.teacher_tokens_per_s or TEACHER_EFFICIENCY * peak / teacher,
        token_bytes=bytes_per_token(question.spec, identity),
    )


def report(answer: Answer) -> str:
    """Say the plan in words and numbers."""
    question = answer.question
    gpus, form = question.student_gpus, question.spec.form
    gbit = answer.token_bytes * 8 / 1e9
    batch_tokens = answer.sequence * answer.micro_batch
    ahead = LOOKAHEAD * batch_tokens * answer.token_bytes
    needed = answer.replicas_needed
    estimate = "estimate" if question.student_tokens_per_s is None else "given"
    estimate_teacher = "estimate" if question.teacher_tokens_per_s is None else "given"
    lines = [
        f"Student {question.model} on {gpus} GPUs, sequences of {answer.sequence}, form {form}",
        f"  cost of a token     student {answer.student_flops / 1e9:.2f} GFLOP, teacher "
        f"{answer.teacher_flops / 1e9:.2f} GFLOP ({answer.teacher_flops / answer.student_flops:.2f}"
        " of the student's)",
        f"  student             {answer.student_rate:,.0f} tokens/s a GPU ({estimate})",
        f"  replica             {answer.teacher_rate:,.0f} tokens/s ({estimate_teacher})",
        f"  replicas, no wait   {needed} ({needed / gpus:.2f} for each student GPU)",
        f"  bytes of a token    {answer.token_bytes:,}",
        f"  into a student GPU  {answer.student_rate * gbit:.2f} Gbit/s; a node of "
        f"{GPUS_PER_NODE}: {answer.student_rate * gbit * GPUS_PER_NODE:.1f} Gbit/s",
        f"  out of a replica    {answer.teacher_rate * gbit:.2f} Gbit/s; a node of "
        f"{GPUS_PER_NODE}: {answer.teacher_rate * gbit * GPUS_PER_NODE:.1f} Gbit/s",
        f"  memory for {LOOKAHEAD} micro-batches ahead: {ahead / 1e9:.2f} GB for each student GPU",
        "  replicas   students wait   tokens/s a student GPU",
    ]
    counts = [needed * part // 4 for part in (1, 2, 3)] + [needed]
    if question.replicas is not None:
        counts = [question.replicas, needed]
    for count in sorted(set(counts) - {0}):
        wait = answer.wait_share(count)
        lines.append(f"  {count:8}   {wait:12.1%}   {answer.student_rate * (1 - wait):,.0f}")
    lines += [
        f"Estimates: {PEAK_TFLOPS:.0f} TFLOP/s (H100, dense bf16, NVIDIA's data sheet), of which a "
        f"student gets {STUDENT_EFFICIENCY:.1%} and a teacher's forward {TEACHER_EFFICIENCY:.0%}. "
        "Measure yours and give --student-tokens-per-s and --teacher-tokens-per-s.",
    ]
    return "\n".join(lines)
