"""A CUDA device that is not there: tensors that say they are on one, and hold no numbers.

torch's fake tensors run all of the Python that a GPU would run, and give the shapes, types, strides
and devices that it would give. A tensor of the CPU among those of the device raises, and so does
what must know numbers (`.item()`, `.tolist()`, `nonzero`, a mask as an index). `Witness` sees the
rest: where the host would wait for the device all the same, and operators that have no CUDA row.

What they cannot show is what a kernel computes, or refuses when it is launched.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mlr1 import cpu

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class Witness(TorchDispatchMode):
    """Sees every operator that runs on the device; on the host there are real tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        """How often each ran, such as "aten.mm.default"."""
        self.waits: list[str] = []
        """Operators at which the host would wait for the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_host = not any(isinstance(tensor, FakeTensor) for tensor in given)
        if on_host and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                # Only a driver locks pages.
                return (torch.clone if func is aten._pin_memory.default else func)(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        self.operators[str(func)] += 1
        out = (_add_product if func is aten.addmm.dtype_out else func)(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not any(tensor.is_cuda for tensor in given + made):
            return out
        if torch.backends.cuda.is_built():
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA"), (
                f"{func} has no row for CUDA"
            )
        if _waits(func, given, made, args, kwargs):
            self.waits.append(str(func))
        return out


def _waits(
    func: Any, given: list[Tensor], made: list[Tensor], args: Any, kwargs: dict[str, Any]
) -> bool:
    if func in COPIES:
        non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
        return not non_blocking and len({tensor.device.type for tensor in given + made}) > 1
    if func is aten.index_put_.default:
        # A number goes under a mask without a count of its places; a tensor does not.
        value = args[2]
        return value.is_cuda and any(i is not None and i.dtype == torch.bool for i in args[1])
    # What is no number of the host's is copied, to the device or back from it.
    return any(tensor.dim() and not tensor.is_cuda for tensor in given)


def _add_product(
    add: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor
) -> Tensor:
    """Stand for `addmm.dtype_out`, of which torch 2.11 has no fake: refuse what its row refuses.

    (aten/src/ATen/native/cuda/Blas.cpp, `_addmm_dtype_out_cuda`.)
    """
    assert left.dtype == right.dtype
    assert out_dtype in (left.dtype, torch.float32)
    assert out.dtype == out_dtype
    assert add.dtype in (out_dtype, left.dtype)
    assert out.shape == (left @ right).shape
    return out


@contextmanager
def fake_cuda() -> Iterator[Witness]:
    """Have `device="cuda"` mean a device without numbers until the end of the block."""
    with ExitStack() as stack:
        if cpu.is_active():
            # It would read every "cuda" as the CPU.
            stack.enter_context(_pop_mode_temporarily())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # Else torch would make a tensor on the device first, to wake it.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "is_initialized", lambda: False)
        # A device, as none is there that a number could stand for.
        patch.setattr(torch.cuda, "current_device", lambda: DEVICE)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Witness())


def backward(total: Tensor) -> None:
    """Run a graph's nodes as `total.backward()` would, whose engine asks the driver for its device.

    Every gradient must have the shape and type of what it belongs to; the engine would cast it.
    """
    assert total.grad_fn is not None
    waiting: dict[Any, dict[int, Tensor]] = {total.grad_fn: {0: torch.ones_like(total)}}
    with torch.no_grad():
        while waiting:
            # The node that was made last: nothing that is left leads to it.
            node = max(waiting, key=lambda node: node._sequence_nr())
            given = waiting.pop(node)
            if hasattr(node, "variable"):
                leaf = node.variable
                leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
                continue
            edges = node.next_functions
            # Functions of Python answer for arguments behind their tensors too.
            for gradient, (following, place) in zip(_run(node, given), edges, strict=False):
                if following is None or gradient is None:
                    continue
                _refuse_other(gradient, following, place)
                sums = waiting.setdefault(following, {})
                sums[place] = sums[place] + gradient if place in sums else gradient


def _run(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    places = range(len(node._input_metadata))
    if callable(node):
        made = node(*(given.get(place) for place in places))
    else:  # of Python, which is given zeros for what did not come
        made = node.apply(
            *(
                given[place]
                if place in given
                else torch.zeros(known.shape, dtype=known.dtype, device=known.device)
                for place, known in zip(places, node._input_metadata, strict=True)
            )
        )
    return made if isinstance(made, tuple) else (made,)


def _refuse_other(gradient: Tensor, node: Any, place: int) -> None:
    known = node._input_metadata[place]
    expected = (known.dtype, tuple(known.shape), known.device)
    assert (gradient.dtype, tuple(gradient.shape), gradient.device) == expected
