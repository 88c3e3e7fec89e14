"""A teacher whose products are of 8-bit numbers, and the gate that it must pass before it serves.

Every linear layer of the body, but not the head, multiplies in E4M3 (4 bits of exponent, 3 of
mantissa, largest number 448). With rows x_i of the input (tokens) and w_j of the weights (outputs):

    s_i = max |x_i| / 448         a scale for each token, from the input itself
    t_j = max |w_j| / 448         a scale for each output, once
    y_ij = s_i t_j sum_k e4m3(x_ik / s_i) e4m3(w_jk / t_j)

summed in fp32. On a GPU torch's scaled product does it; on a CPU the same 8-bit numbers are
multiplied in fp32, which is slow and there to be tested. Everything else stays as it was.

Shapes: T tokens, N outputs, K inputs, d hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_mlr1.errors import MachineError, TeacherError
from megatron_mlr1.teacher.fp8_gate import TEXT, Gate
from megatron_mlr1.teacher.identity import load_tokenizer
from megatron_mlr1.teacher.model import TeacherModel, load_teacher
from megatron_mlr1.teacher.spec import TargetRequest, TargetSpec, TeacherIdentity

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0
"""Of E4M3; beyond it torch gives NaN."""
BLOCK: Final = 16
"""The scaled product of a GPU takes sizes that are multiples of it; other layers stay as they
are, on every device."""
OLDEST_GPU: Final = (8, 9)
NUMERICS: Final = "fp8-e4m3 rows-of-weights tokens-of-input"
PIECE: Final = 1024
"""Tokens of one sequence of the gate's text, at most."""
MOST_TOKENS: Final = 16 * PIECE
FEWEST_TOKENS: Final = 32
CHUNK: Final = 128
"""Rows of logits that the gate has at a time."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far FP8 moved a teacher's distribution, over some text."""

    kl: float
    """Mean of KL(before, after), nats a token."""
    agreement: float
    """Share of the tokens whose likeliest id stayed the same."""
    tokens: int

    def passes(self, gate: Gate) -> bool:
        """Say whether a teacher may serve; one whose figures are no numbers may not."""
        return self.kl <= gate.max_kl and self.agreement >= gate.min_agreement

    def __str__(self) -> str:
        return (
            f"FP8 moves the distribution by {self.kl:.2e} nats a token and keeps the likeliest id "
            f"of {100 * self.agreement:.2f} % of {self.tokens} tokens"
        )


class Fp8Linear(nn.Module):
    """A linear layer, frozen, by the formula above."""

    levels: Tensor
    """(N, K), E4M3."""
    scale: Tensor
    """(N, 1), fp32."""
    bias: Tensor | None
    """(N,)."""

    def __init__(self, linear: nn.Linear) -> None:
        """Quantise a layer's weights; its bias stays as it is."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        levels_NK, scale_N1 = quantise_rows(linear.weight.detach())
        self.register_buffer("levels", levels_NK)
        self.register_buffer("scale", scale_N1)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., K) to (..., N) of the same type."""
        levels_TK, scale_T1 = quantise_rows(inputs.reshape(-1, self.in_features))
        outputs_TN = _product(levels_TK, scale_T1, self.levels, self.scale).to(inputs.dtype)
        if self.bias is not None:
            outputs_TN = outputs_TN + self.bias
        return outputs_TN.view(*inputs.shape[:-1], self.out_features)


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give E4M3 numbers of the shape of `rows`, and the fp32 scale of each row, (rows, 1)."""
    exact = rows.float()
    # A row of zeros has any scale; the quotient of the largest number may round beyond LARGEST.
    scale = (exact.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo().tiny)
    return (exact / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def _product(levels_TK: Tensor, scale_T1: Tensor, levels_NK: Tensor, scale_N1: Tensor) -> Tensor:
    if levels_TK.device.type == "cpu":
        return (levels_TK.float() @ levels_NK.float().T) * scale_T1 * scale_N1.T
    by_row = functional.ScalingType.RowWise
    return functional.scaled_mm(
        levels_TK,
        levels_NK.T,
        scale_T1,
        by_row,
        scale_N1.T.contiguous(),
        by_row,
        output_dtype=torch.bfloat16,
    )


def quantise(module: nn.Module) -> int:
    """Put FP8 layers into the place of the linear ones in a module; give their number.

    A layer's old weights are gone before the next block's are quantised.
    """
    number = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and _fits(child):
            setattr(module, name, Fp8Linear(child))
            number += 1
        else:
            number += quantise(child)
    return number


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % BLOCK == linear.out_features % BLOCK == 0


def load_fp8_teacher(folder: Path, device: torch.device, gate: Gate) -> tuple[TeacherModel, Drift]:
    """Load a folder in bf16, make its products FP8, and see what that changes.

    Args:
        folder: as `load_teacher` takes it.
        device: `cpu`, or `cuda:N` of compute capability 8.9 or higher.
        gate: the text, and how much may change.

    Raises:
        TeacherError: the folder is no teacher, has no layer for FP8, or FP8 changes too much.
        MachineError: the device cannot multiply E4M3.
    """
    _refuse_old_device(device)
    teacher = load_teacher(folder, device, "bfloat16")
    requests = _requests(folder, gate, teacher)
    before = _states(teacher, requests)
    if quantise(teacher.body) == 0:
        raise TeacherError(
            f"{folder} has no linear layer whose sizes are multiples of {BLOCK}, which FP8 needs. "
            "Serve it without --precision fp8."
        )
    teacher.identity = fp8_identity(teacher.identity)
    drift = measure(before, _states(teacher, requests), teacher.head)
    if not drift.passes(gate):
        raise TeacherError(
            f"{teacher.identity.name}: {drift}; at most {gate.max_kl:g} nats and at least "
            f"{100 * gate.min_agreement:g} % may serve. Serve without --precision fp8, or accept "
            "what is measured: --fp8-max-kl, --fp8-min-agreement; --fp8-text measures on text of "
            "yours."
        )
    return teacher, drift


def fp8_identity(identity: TeacherIdentity) -> TeacherIdentity:
    """Give the identity of the same teacher with FP8 products: it is another teacher."""
    hasher = hashlib.blake2b(f"{identity.fingerprint} {NUMERICS}".encode(), digest_size=16)
    return replace(
        identity,
        fingerprint=hasher.hexdigest(),
        numerics=f"{NUMERICS} {identity.numerics}",
    )


def measure(before_TD: Tensor, after_TD: Tensor, head_VD: Tensor) -> Drift:
    """Compare the distributions over all ids that two tables of states have by one head."""
    weights = head_VD.float()
    divergence = torch.zeros((), dtype=torch.float64)
    same = 0
    with torch.inference_mode():
        for one, other in zip(before_TD.split(CHUNK), after_TD.split(CHUNK), strict=True):
            logp = (one.float() @ weights.T).log_softmax(-1)
            logq = (other.float() @ weights.T).log_softmax(-1)
            divergence += (logp.exp() * (logp - logq)).sum().double().cpu()
            same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
    tokens = before_TD.size(0)
    return Drift(kl=float(divergence) / tokens, agreement=same / tokens, tokens=tokens)


def _refuse_old_device(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        name = torch.cuda.get_device_name(device)
        raise MachineError(
            f"{device} is a {name}; FP8 needs compute capability {'.'.join(map(str, OLDEST_GPU))} "
            "or higher. Serve without --precision fp8."
        )


def _requests(folder: Path, gate: Gate, teacher: TeacherModel) -> Sequence[TargetRequest]:
    """Cut the gate's text into sequences."""
    ids = load_tokenizer(folder)(_text(gate))["input_ids"][:MOST_TOKENS]
    if len(ids) < FEWEST_TOKENS:
        raise TeacherError(
            f"the text of the FP8 gate has {len(ids)} tokens; it must have {FEWEST_TOKENS} to say "
            "anything. Give --fp8-text more of it."
        )
    length = min(PIECE, teacher.max_tokens)
    pieces = [np.array(ids[begin : begin + length], "<i4") for begin in range(0, len(ids), length)]
    return [TargetRequest(one, np.array([0, one.size], "<i4"), TargetSpec()) for one in pieces]


def _text(gate: Gate) -> str:
    if gate.text is None:
        return TEXT
    try:
        return gate.text.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"--fp8-text {gate.text} cannot be read ({error}); it must be a file of UTF-8 text "
            "like what the students train on. Name another."
        ) from error


def _states(teacher: TeacherModel, requests: Sequence[TargetRequest]) -> Tensor:
    try:
        with torch.inference_mode():
            return torch.cat([teacher.hidden(request) for request in requests])
    except RuntimeError as error:
        raise MachineError(
            f"the teacher fails on this device ({error}). Give it more memory, or serve without "
            "--precision fp8."
        ) from error
