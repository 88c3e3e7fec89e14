"""What Transformer Engine's Python calls in its compiled half, by plain torch on the CPU.

`transformer_engine_torch` is a library of CUDA kernels; this module has its place, so that all of
Transformer Engine's Python runs without a GPU: linear layers, norms, softmax, Adam, and FP8 with
delayed and current scaling in E4M3 and E5M2, in the layouts of Hopper (a copy by rows, a transposed
one by columns). Numbers in FP8 are real: they are rounded and stored in one byte, and products
take what the bytes say. It is written for release 2.18, whose signatures are those of
`pytorch/csrc/extensions/pybind.cpp`.
"""

from collections import Counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

CALLS: Counter[str] = Counter()
"""How often each function was called."""


class _Members(type):
    """Numbers the members of a class as they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        setattr(cls, name, cls(len(cls.__members__)))
        return getattr(cls, name)

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, cls)}


class Number(int, metaclass=_Members):
    """A value of one of its C++ enumerations; the numbers are our own."""


class DType(Number):
    """Its types of elements."""


BYTE, INT32, FLOAT32, FLOAT16, BFLOAT16 = (
    getattr(DType, f"k{name}") for name in ("Byte", "Int32", "Float32", "Float16", "BFloat16")
)
E4M3, E5M2, _ = DType.kFloat8E4M3, DType.kFloat8E5M2, DType.kFloat4E2M1
TYPES = {
    **{BYTE: torch.uint8, INT32: torch.int32, FLOAT32: torch.float32},
    **{FLOAT16: torch.float16, BFLOAT16: torch.bfloat16},
}
FORMATS = {E4M3: (torch.float8_e4m3fn, 448.0), E5M2: (torch.float8_e5m2, 57344.0)}
"""Type and largest number of each format of FP8."""


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, _noop: Any = None) -> Any:
    dtype, largest = FORMATS[quantizer.dtype]
    amax = tensor.abs().amax().float()
    if hasattr(quantizer, "scale"):  # delayed: known beforehand, and amax is for the next one
        scale = quantizer.scale
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        scale = (largest / amax).reshape(1) if amax > 0 else torch.ones(1)
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype) if output is None else output
    bits = (tensor.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)
    if out._data is not None:
        out._data.copy_(bits.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(bits.view(-1, bits.shape[-1]).t().reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_((1 / scale).view(out._scale_inv.shape))
    return out


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, _device: Any, _pin: bool
) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    turned = [shape[-1], *shape[:-1]]
    words = {
        "data": torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": (
            torch.empty(turned, dtype=torch.uint8) if quantizer.columnwise_usage else None
        ),
        "fp8_scale_inv": torch.ones(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**words, fake_dtype=dtype)
    return Float8Tensor(shape=torch.Size(shape), dtype=dtype, **words)


def fp8_transpose(data: Tensor, _dtype: Any, out: Tensor | None = None) -> Tensor:
    turned = data.flatten(0, -2).t().contiguous()
    return turned if out is None else out.copy_(turned.view(out.shape))


def _plain(tensor: Any) -> Tensor:
    """Give the numbers of a tensor in fp32, as a matrix."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.detach().float().flatten(0, -2)
    dtype, _ = FORMATS[tensor._fp8_dtype]
    if tensor._data is not None:
        return tensor._data.view(dtype).float().flatten(0, -2) * tensor._scale_inv
    return (tensor._transpose.view(dtype).float().flatten(1) * tensor._scale_inv).t()


def dequantize(tensor: Any, otype: DType) -> Tensor:
    return _plain(tensor).view(tensor.size()).to(TYPES[otype])


def generic_gemm(
    a: Any, transa: bool, b: Any, transb: bool, out: Tensor | None, *words: Any, **more: Any
) -> tuple[Tensor, None, None, None]:
    quantizer, out_type, bias, _, gelu, _, _, _, _, accumulate, _ = words
    assert (quantizer, bias, gelu, more["comm_overlap"]) == (None, None, False, None)
    # Of matrices by columns, as cuBLAS has them: by rows the factors change places.
    left, right = _plain(b), _plain(a)
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    if out is not None:
        product = product.view(out.shape)
        out.add_(product.to(out.dtype)) if accumulate else out.copy_(product)
        return out, None, None, None
    shape = (*b.size()[:-1], product.shape[-1]) if not transb else product.shape
    return product.view(shape).to(TYPES[out_type]), None, None, None


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, otype: Any, *_: Any
) -> tuple[Any, None, Tensor]:
    rows = x.float().flatten(0, -2)
    scale = torch.rsqrt(rows.square().mean(-1) + eps)
    made = (rows * scale[:, None] * weight.float()).view(x.shape)
    made = made.to(otype if isinstance(otype, torch.dtype) else TYPES[otype])
    if quantizer is not None:
        return quantize(made, quantizer, out), None, scale
    return made if out is None else out.copy_(made), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    normal = x.float().flatten(0, -2) * scale[:, None]
    given = grad.float().flatten(0, -2)
    weighed = given * weight.float()
    made = (weighed - normal * (weighed * normal).mean(-1, keepdim=True)) * scale[:, None]
    return made.view(x.shape).to(x.dtype), (given * normal).sum(0).to(weight.dtype)


def swiglu(x: Tensor, quantizer: Any) -> Any:
    gate, up = x.float().chunk(2, -1)
    made = (silu(gate) * up).to(x.dtype)
    return made if quantizer is None else quantize(made, quantizer)


def dswiglu(grad: Tensor, x: Tensor, quantizer: Any) -> Any:
    gate, up = x.float().chunk(2, -1)
    given, turn = grad.float(), torch.sigmoid(gate)
    of_gate = given * up * turn * (1 + gate * (1 - turn))
    made = torch.cat((of_gate, given * gate * turn), -1).to(x.dtype)
    return made if quantizer is None else quantize(made, quantizer)


def scaled_masked_softmax_forward(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax((x.float() * scale).masked_fill(mask, -1e4), -1).to(x.dtype)


def scaled_masked_softmax_backward(grad: Tensor, out: Tensor, scale: float) -> Tensor:
    given, made = grad.float(), out.float()
    return ((given - (given * made).sum(-1, keepdim=True)) * made * scale).to(grad.dtype)


def get_fused_attn_backend(*_: Any, **__: Any) -> Any:
    return Backend.NVTE_No_Backend


def get_cudnn_version() -> int:
    return 91900


def get_cublasLt_version() -> int:  # noqa: N802  its name
    return 130100


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    algo: str,
    dtype: Any,
    margin: int,
) -> None:
    largest = FORMATS[dtype][1]
    parts = amaxes.split([scale.numel() for scale in scales])
    for now, history, scale in zip(parts, histories, scales, strict=True):
        history[0].copy_(now)
        amax = history.amax(0) if algo == "max" else history[0].clone()
        scale.copy_(torch.where(amax > 0, largest / amax / 2**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0].zero_()


def multi_tensor_l2norm(
    _chunk: int, _flag: Tensor, lists: list[list[Tensor]], each: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if each else norms[:0]


def multi_tensor_scale(_chunk: int, _flag: Tensor, lists: list[list[Tensor]], by: Any) -> None:
    for given, out in zip(*lists, strict=True):
        out.copy_(given * by)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_adam(_chunk: int, _flag: Tensor, lists: list[list[Tensor]], *numbers: Any) -> None:
    rate, beta1, beta2, eps, step, decoupled, corrected, decay = numbers
    assert (type(step), decoupled) == (int, True)
    first = 1 - beta1**step if corrected else 1
    second = 1 - beta2**step if corrected else 1
    for grad, parameter, mean, square in zip(*lists, strict=True):
        mean.lerp_(grad.float(), 1 - beta1)
        square.lerp_(grad.float().square(), 1 - beta2)
        change = mean / first / ((square / second).sqrt() + eps) + decay * parameter
        parameter.sub_(rate * change)


class Backend(Number):
    """Its kernels of attention: none."""


def module() -> ModuleType:
    """Make a module of these functions and of the enumerations, and of errors for all else."""
    made = ModuleType("transformer_engine_torch")
    for name, function in list(globals().items()):
        if getattr(function, "__module__", None) == __name__ and not name.startswith("_"):
            setattr(made, name, _counted(name, function) if callable(function) else function)
    made.DType = DType  # type: ignore[attr-defined]
    made.NVTE_Fused_Attn_Backend = Backend  # type: ignore[attr-defined]
    for name in ABSENT:
        setattr(made, name, _absent(name))
    made.__all__ = [name for name in vars(made) if not name.startswith("_")]  # type: ignore[attr-defined]
    made.__getattr__ = _enumeration  # type: ignore[method-assign]
    return made


ABSENT = ("layernorm_fwd", "layernorm_bwd")
"""Functions that are asked for by name and never called."""


def _counted(name: str, function: Any) -> Any:
    def call(*arguments: Any, **words: Any) -> Any:
        CALLS[name] += 1
        return function(*arguments, **words)

    return call


def _absent(name: str) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

    return call


def _enumeration(name: str) -> Any:
    """Give a class for what begins with a capital letter, a function that raises for the rest."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Number,), {}) if name[0].isupper() else _absent(name)
