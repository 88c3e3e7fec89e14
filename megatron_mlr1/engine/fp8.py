"""What FP8 asks of a run's flags and of its device, said before training starts.

The engine hands its FP8 flags to Transformer Engine, which finds out in the middle of the first
step, or, where the layers are torch's, leaves everything in bf16 without a word. `--fp8-format` and
`--fp8-recipe` concern the linear layers of the body; embedding, norms, attention cores and the head
with its loss stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes.plan import merge, user_flags

DEFAULT_RECIPE = "delayed"
"""The engine's, where --fp8-recipe is missing."""

CAPABILITY: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
)
"""The lowest compute capability of a recipe: Transformer Engine's `pytorch/quantization.py`."""

BLOCKWISE_CUDA = (12, 9)
"""The lowest CUDA whose cuBLAS multiplies 1 x 128 blocks: the same file."""

MULTIPLE: Mapping[str, int] = MappingProxyType({"mxfp8": 32})
"""What both sizes of every matrix must be a multiple of, where it is not 16: `get_fp8_align_size`
of `megatron/core/fp8_utils.py`. The backward contracts over the tokens, so they count too."""
SIXTEEN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What of a CUDA device decides about FP8."""

    name: str
    capability: tuple[int, int]
    cuda: tuple[int, int]
    """The CUDA version that torch was built with."""


def is_asked_for(words: Sequence[str]) -> bool:
    """Tell whether the engine's words ask for FP8."""
    return any(flag.name == "fp8-format" for flag in user_flags(words))


def refuse_impossible(
    words: Sequence[str], *, device: Device | None, transformer_engine: str | None
) -> None:
    """Refuse FP8 that would fail later, or that would do nothing.

    Args:
        words: the engine's, which ask for FP8.
        device: what is trained on; None in CPU mode.
        transformer_engine: version that imports here, or None.

    Raises:
        ConfigError: says which flag, and what to do.
    """
    if device is None:
        raise ConfigError(
            "--fp8-format needs an NVIDIA GPU of compute capability 8.9 or higher, and this run is "
            "in CPU mode. Leave the FP8 flags out here."
        )
    if transformer_engine is None:
        raise ConfigError(
            "--fp8-format needs Transformer Engine, which does not import here. Install it "
            "(pip install --no-build-isolation 'megatron_mlr1[fp8]'), see `python -m "
            "megatron_mlr1.doctor`, or leave the FP8 flags out."
        )
    flags = {flag.name: flag.values for flag in merge([user_flags(words)]).values()}
    if flags.get("transformer-impl") == ("local",):
        raise ConfigError(
            "--fp8-format is given with --transformer-impl local, whose linear layers are torch's "
            "and know no FP8: the run would be in bf16. Leave one of the two out."
        )
    recipe = (*flags.get("fp8-recipe", ()), DEFAULT_RECIPE)[0]
    _refuse_device(recipe, device)
    _refuse_sizes(recipe, flags)


def _refuse_device(recipe: str, device: Device) -> None:
    needed = CAPABILITY.get(recipe, (8, 9))
    if device.capability < needed:
        can = [name for name, lowest in CAPABILITY.items() if lowest <= device.capability]
        instead = f"Choose --fp8-recipe {' or '.join(can)}." if can else "Leave the FP8 flags out."
        raise ConfigError(
            f"--fp8-recipe {recipe} needs compute capability {_dotted(needed)}, and {device.name} "
            f"has {_dotted(device.capability)}. {instead}"
        )
    if recipe == "blockwise" and device.cuda < BLOCKWISE_CUDA:
        raise ConfigError(
            f"--fp8-recipe blockwise needs CUDA {_dotted(BLOCKWISE_CUDA)}, and torch was built for "
            f"{_dotted(device.cuda)} here. Choose --fp8-recipe tensorwise or delayed, or install a "
            "torch for a newer CUDA."
        )


def _refuse_sizes(recipe: str, flags: Mapping[str, tuple[str, ...]]) -> None:
    multiple = MULTIPLE.get(recipe, SIXTEEN)
    for what, size in sizes(flags).items():
        if size % multiple:
            raise ConfigError(
                f"FP8 multiplies matrices whose sizes are multiples of {multiple} ({recipe}), and "
                f"{what} are {size}. Change the flags that make it, or leave the FP8 flags out."
            )


def sizes(flags: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Work out the sizes of a run's matrices, as one process multiplies them.

    Args:
        flags: values of the engine's flags by name; what a missing one decides is left out.
    """
    number = {name: int(values[0]) for name, values in flags.items() if _is_whole(values)}
    tensor = number.get("tensor-model-parallel-size", 1)
    context = number.get("context-parallel-size", 1)
    heads, groups = number.get("num-attention-heads"), number.get("num-query-groups")
    channels = number.get("kv-channels")
    found = {}
    if "hidden-size" in number:
        found["the channels of --hidden-size"] = number["hidden-size"]
    if "ffn-hidden-size" in number:
        found["the channels of --ffn-hidden-size of one process"] = (
            number["ffn-hidden-size"] // tensor
        )
    if heads and channels:
        found["the channels of all heads of one process"] = heads * channels // tensor
        if groups:
            found["the channels of query, key and value of one process"] = (
                (heads + 2 * groups) * channels // tensor
            )
    if "seq-length" in number and "micro-batch-size" in number:
        found["the tokens of a micro-batch of one process"] = (
            number["seq-length"] * number["micro-batch-size"] // context
        )
    return found


def _is_whole(values: tuple[str, ...]) -> bool:
    return len(values) == 1 and values[0].isdecimal()


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
