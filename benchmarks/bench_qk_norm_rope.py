"""Claim: one op takes a fused QKV apart, norms and rotates it in less time than the engine's calls.

Prints a table per device: milliseconds and GB/s of useful traffic (forward reads and writes a fused
row; backward reads the gradients and what was turned, and writes the row's gradient) of the op,
of the engine's own split, L2 norm and rotary embedding, and on CUDA of the same with Transformer
Engine's fused rotation where it is installed. `--save` keeps the table in benchmarks/results/.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mlr1 import cpu
from megatron_mlr1.ops.extension import EXTENSION
from megatron_mlr1.ops.qk_norm_rope import qk_norm_rope

RESULTS = Path(__file__).parent / "results" / "qk_norm_rope.md"
MODELS = {"140M": (9, 3), "360M": (16, 4), "950M": (24, 6)}
"""Heads of queries, and of keys and values; all of 64 numbers."""
WIDTH = 64
EPS = 1e-5
TOKENS = {"cpu": (256, 2), "cuda": (2048, 16)}
"""Positions and sequences; on CUDA a step's of the pre-training recipe."""
REPEATS = {"cpu": 5, "cuda": 100}
DOCUMENT = 128
"""Tokens of each document in the packed rows of the table."""

Parts = tuple[Tensor, Tensor, Tensor]
Split = Callable[[Tensor], Parts]


def main() -> None:
    """Measure on every device of this machine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS.name}")
    save = parser.parse_args().save
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if devices == ["cpu"]:
        cpu.activate()  # for the engine's functions
    lines = [line for device in devices for line in table(device)]
    text = "\n".join(["# Split, norm and rotation of a fused QKV", "", *lines])
    print(text)
    if save:
        RESULTS.write_text(text + "\n")


def table(device: str) -> list[str]:
    """Rows of the table of one device, in Markdown."""
    positions, sequences = TOKENS[device]
    lines = [
        f"{machine(device)}; torch {torch.__version__}; {positions * sequences} tokens, heads of "
        f"{WIDTH}; compiled ops: {'yes' if EXTENSION else 'no'}. Best of {REPEATS[device]}. "
        f"Packed: documents of {DOCUMENT} tokens.",
        "",
        "| type | model | tokens | implementation | forward ms | GB/s | with backward ms | GB/s |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for model, (heads, groups) in MODELS.items():
            for packed in (False, True):
                lines += rows(device, dtype, model, (heads, groups), packed=packed)
    return [*lines, ""]


def rows(
    device: str, dtype: torch.dtype, model: str, shape: tuple[int, int], *, packed: bool
) -> list[str]:
    """Time every implementation on one shape."""
    heads, groups = shape
    positions, sequences = TOKENS[device]
    leading = (positions * sequences, 1) if packed else (positions, sequences)
    columns = (heads + 2 * groups) * WIDTH
    x = torch.randn(*leading, columns, device=device, dtype=dtype, requires_grad=True)
    grads = [
        torch.randn(*leading, n, WIDTH, device=device, dtype=dtype) for n in (heads, groups, groups)
    ]
    unit = x.numel() * x.element_size() / 1e9
    # Backward reads Q and K again, of which a row has all but the values.
    whole = unit * (2 + 3 - groups / (heads + 2 * groups))
    lines = []
    for name, function in implementations(device, positions, shape, packed=packed).items():
        forward = best_seconds(forward_of(function, x), device)
        both = best_seconds(both_of(function, x, grads), device)
        lines.append(
            f"| {str(dtype).removeprefix('torch.')} | {model} | "
            f"{'packed' if packed else f'{positions} x {sequences}'} | {name} | "
            f"{forward * 1e3:.3f} | {2 * unit / forward:.1f} | {both * 1e3:.3f} | "
            f"{whole / both:.1f} |"
        )
    return lines


def implementations(
    device: str, positions: int, shape: tuple[int, int], *, packed: bool
) -> dict[str, Split]:
    """What is compared, by name."""
    frequencies = 1 / 500_000 ** (torch.arange(0, WIDTH, 2, device=device) / WIDTH)
    length = DOCUMENT if packed else positions
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    # The engine's embedding: each angle twice.
    embedding = angles.repeat_interleave(2, dim=1)[:, None, None]
    bounds = None
    if packed:
        tokens = TOKENS[device][0] * TOKENS[device][1]
        bounds = torch.arange(0, tokens + 1, DOCUMENT, device=device, dtype=torch.int32)

    def ours(qkv: Tensor) -> Parts:
        return qk_norm_rope(
            qkv, embedding[:, 0, 0, ::2], num_groups=shape[1], eps=EPS, bounds=bounds
        )

    named: dict[str, Split] = {"mlr1": ours, "Megatron-Core": engine(embedding, bounds, shape)}
    if device == "cuda":
        fused = transformer_engine()
        if fused is not None:
            name = "Megatron-Core, Transformer Engine's rotation"
            named[name] = engine(embedding, bounds, shape, fused)
    return named


def transformer_engine() -> Any:
    """Transformer Engine's rotary embedding, or None where it is not installed."""
    try:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    except ImportError:
        return None
    return apply_rotary_pos_emb


def engine(
    embedding: Tensor, bounds: Tensor | None, shape: tuple[int, int], fused: Any = None
) -> Split:
    """The peer: what the engine's attention does between its projection and its core."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.torch_norm import L2Norm

    heads, groups = shape
    norm = L2Norm(WIDTH, EPS)

    def rotate(x: Tensor) -> Tensor:
        if fused is not None:
            layout = "sbhd" if bounds is None else "thd"
            words = {"tensor_format": layout, "fused": True, "interleaved": True}
            rotated: Tensor = fused(x, embedding, cu_seqlens=bounds, **words)
            return rotated
        if bounds is None:
            return rope_utils._apply_rotary_pos_emb_bshd(x, embedding, True)  # type: ignore[no-any-return]
        return rope_utils._apply_rotary_pos_emb_thd(  # type: ignore[no-any-return]
            x, bounds, embedding, True, cp_group=OneRank()
        )

    def split(qkv: Tensor) -> Parts:
        grouped = qkv.view(*qkv.shape[:2], groups, -1)
        q, k, v = torch.split(grouped, [heads // groups * WIDTH, WIDTH, WIDTH], dim=3)
        q, k = norm(q.reshape(*qkv.shape[:2], heads, WIDTH)), norm(k)
        if bounds is None:
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


def forward_of(function: Split, x: Tensor) -> Callable[[], object]:
    """One forward without a graph."""

    def run() -> object:
        with torch.no_grad():
            return function(x)

    return run


def both_of(function: Split, x: Tensor, grads: list[Tensor]) -> Callable[[], object]:
    """One forward and one backward."""
    return lambda: torch.autograd.grad(function(x), x, grads)


def best_seconds(run: Callable[[], object], device: str) -> float:
    """Shortest of several runs, after two that warm up."""
    times = []
    for repeat in range(REPEATS[device] + 2):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return min(times)


def machine(device: str) -> str:
    """Name of what was measured."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
