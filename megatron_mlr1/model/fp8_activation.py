"""SwiGLU that hands the down projection its FP8 input, where Transformer Engine lets it.

Under FP8 a linear layer of Transformer Engine first quantises its input: it reads the activation
once more and writes it twice, by rows for the product and by columns for the gradient of the
weight. Such a layer takes an input that is quantised already, and then makes no such pass. So here
the activation itself writes E4M3, with the scale of the layer's own input quantizer, and records
the amax where that quantizer would have recorded it.

That is possible with delayed scaling alone, where the scale is known beforehand; other recipes
compute it from the very values. Where it is not possible the activation is the plain one, and the
layer quantises as ever. Either way gives the same bits (`ops.swiglu_fp8`), so the two mix freely:

    the first step      the layer has no quantizer yet             plain
    evaluation                                                     plain
    recomputed layers   first pass FP8; the second pass needs the scale of the first, which the
                        layer brings back for itself alone         plain

What this rests on is private to Transformer Engine, and was read in the source of its releases
from OLDEST to before TOO_NEW: that `Linear` takes a `Float8Tensor` and never frees it, that its
quantizers are kept in `quantizers["scaling_fwd"]` with the input's first and share their `scale`
and `amax` with the tensors that are reduced between ranks, and that a step without a new recipe
keeps both. A release outside of these gets the plain activation.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_mlr1.model.precision import transformer_engine_version
from megatron_mlr1.ops.swiglu import swiglu
from megatron_mlr1.ops.swiglu_fp8 import swiglu_fp8

OLDEST, TOO_NEW = (2, 9), (2, 19)
"""Releases of Transformer Engine, major and minor number."""
CAPABILITY = (9, 0)
"""Of the GPU: FP8 products of Hopper take both operands by rows, hence the columnwise copy."""

_log = logging.getLogger(__name__)


class Fp8SwiGLU(nn.Module):
    """The activation between the two linear layers of an MLP: [..., 2F] to [..., F]."""

    def __init__(self, *, config: TransformerConfig) -> None:
        super().__init__()
        self._reason = reason_against(config)
        # In a list, so that the layer does not become a part of this module.
        self._fed: list[nn.Module] = []

    def feed(self, linear: nn.Module) -> None:
        """Name the layer that takes the output; without a call the activation is the plain one."""
        if self._reason is None:
            self._fed = [linear]
            linear.register_forward_hook(_keep_what_backward_needs)
        else:
            _say_once(self._reason)

    def forward(self, gate_up: Tensor) -> Tensor:
        """Give silu(gate) * up for [gate | up], in E4M3 where the layer behind takes it."""
        if self._fed and gate_up.dtype == torch.bfloat16 and gate_up.is_cuda:
            linear = self._fed[0]
            quantizer = _input_quantizer(linear)
            if quantizer is not None:
                out: Tensor = _ToFloat8.apply(  # type: ignore[no-untyped-call]
                    gate_up, quantizer, _keeps_input(linear)
                )
                return out
        return swiglu(gate_up, kernel="mlr1")


def build_fed(build: Callable[..., nn.Module], **words: Any) -> nn.Module:
    """Build an MLP, and tell its activation, an `Fp8SwiGLU`, which layer it feeds."""
    mlp: Any = build(**words)
    mlp.activation_func.feed(mlp.linear_fc2)
    built: nn.Module = mlp
    return built


def reason_against(config: TransformerConfig) -> str | None:
    """Say why a run cannot have its activations quantised here; None where it can."""
    if config.fp8 is None:
        return "the run is not in FP8 (--fp8-format)"
    if config.fp8_recipe != "delayed":
        return (
            "the scale of an activation is known beforehand with --fp8-recipe delayed alone, and "
            f"the recipe is {config.fp8_recipe}"
        )
    for name, needed in _SETTINGS.items():
        value = getattr(config, name)
        if value != needed:
            return f"it needs {name} to be {needed}, and that is {value}"
    version = transformer_engine_version()
    if version is None:
        return "there is no Transformer Engine"
    if not OLDEST <= _release(version) < TOO_NEW:
        return (
            f"Transformer Engine is {version}, and it is known to fit releases from "
            f"{_text(OLDEST)} to before {_text(TOO_NEW)}"
        )
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        return (
            f"the GPU has compute capability {_text(found)}, and the layout is that of "
            f"{_text(CAPABILITY)}"
        )
    return None


_SETTINGS = {
    "transformer_impl": "transformer_engine",
    "cuda_graph_impl": "none",
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "tp_comm_overlap": False,
    "quant_recipe": None,
}
"""The linear layers that it is for, and off what takes hold of activations or quantizers itself."""


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


@cache
def _say_once(reason: str) -> None:
    _log.warning("The activation is not quantised in its own pass: %s.", reason)


def _keeps_input(linear: nn.Module) -> bool:
    """Whether the layer's backward will need its input, by columns."""
    weight: Tensor = linear.weight  # type: ignore[assignment]  # nn.Module knows no attributes
    return torch.is_grad_enabled() and weight.requires_grad


def _input_quantizer(linear: Any) -> Any | None:
    """Give the quantizer that the layer's next forward will use; None where that is not certain."""
    state = _te("pytorch.quantization").FP8GlobalStateManager
    if (
        not (state.is_fp8_enabled() and linear.training and linear.fp8_initialized)
        # Another recipe may make the layer build its quantizers anew.
        or state.get_fp8_recipe() != linear.fp8_meta.get("recipe")
        or _te("pytorch.distributed").in_fp8_activation_recompute_phase()
        or _te("debug.pytorch.debug_state").TEDebugState.debug_enabled
    ):
        return None
    quantizer = linear.quantizers["scaling_fwd"][0]
    is_delayed = type(quantizer) is _te("pytorch.tensor.float8_tensor").Float8Quantizer
    e4m3 = _te("pytorch.constants").TE_DType[torch.float8_e4m3fn]
    return quantizer if is_delayed and quantizer.dtype == e4m3 else None


@cache
def _te(module: str) -> Any:
    """Import a module of Transformer Engine, which is not to be imported where nobody uses it."""
    return import_module(f"transformer_engine.{module}")


def _keep_what_backward_needs(linear: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
    """Drop the rows of an input of ours, as the layer drops those of an input of its own."""
    if isinstance(inputs[0], _te("pytorch.tensor.float8_tensor").Float8Tensor) and _keeps_input(
        linear
    ):
        inputs[0].update_usage(rowwise_usage=False, columnwise_usage=True)


class _ToFloat8(torch.autograd.Function):
    """`ops.swiglu_fp8` as a `Float8Tensor`, with the gradient of `ops.swiglu`."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, quantizer: Any, transpose: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        out, out_t, scale_inv = swiglu_fp8(
            gate_up, quantizer.scale, quantizer.amax, transpose=transpose
        )
        made: Tensor = _te("pytorch.tensor.float8_tensor").Float8Tensor(
            shape=out.shape,
            dtype=gate_up.dtype,
            data=out,
            data_transpose=out_t.view(-1, *out.shape[:-1]) if transpose else None,
            fp8_scale_inv=scale_inv.view(1),
            fp8_dtype=quantizer.dtype,
            quantizer=quantizer,
        )
        return made

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        grad: Tensor = torch.ops.mlr1.swiglu_backward(grad_out, gate_up)
        return grad, None, None
