"""The loader's batches through an NVIDIA DALI pipeline, which brings them to the GPU ahead of time.

The same reader gives the samples, so the batches are the thread's, bit for bit. Without a GPU the
pipeline runs on the CPU.
"""

from importlib import import_module
from typing import Any, Self

import torch
from numpy.typing import NDArray

from megatron_mlr1.data.loader import Batch, Loader
from megatron_mlr1.errors import MachineError

AHEAD = 2
"""Batches that lie ready behind the pipeline: one is copied while one is computed on."""


class DaliLoader:
    """An endless iterator over the micro-batches of one rank, as `Loader` is."""

    def __init__(self, loader: Loader, micro_batch: int, *, device: int | None) -> None:
        """Build the pipeline behind a loader.

        Args:
            loader: what reads; closed by `close`.
            micro_batch: samples of a batch.
            device: the CUDA device that batches are brought to; None leaves them on the CPU.

        Raises:
            MachineError: DALI is not installed, or does not run here.
        """
        dali, self._torch = _import("nvidia.dali"), _import("nvidia.dali.plugin.pytorch")
        fn = _import("nvidia.dali.fn")
        self._loader = loader
        self._device = device
        first = next(loader)
        self._kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in first.items()}
        self._first: Batch | None = first
        pipeline = dali.Pipeline(
            batch_size=micro_batch, num_threads=1, device_id=device, prefetch_queue_depth=AHEAD
        )
        with pipeline:
            outputs = fn.external_source(source=self._arrays, num_outputs=len(first), batch=True)
            pipeline.set_outputs(*(out if device is None else out.gpu() for out in outputs))
        try:
            pipeline.build()
        except RuntimeError as error:
            raise MachineError(
                f"DALI cannot build its pipeline ({error}). Give --mlr1-loader thread, or install "
                "the build of nvidia-dali that fits the driver."
            ) from error
        self._pipeline = pipeline

    def __iter__(self) -> Self:
        """Give the loader itself."""
        return self

    def __next__(self) -> Batch:
        """Give the next micro-batch, on the device.

        Raises:
            DataError: a corpus cannot be read.
        """
        outputs = self._pipeline.run()
        return {
            name: self._tensor(out, *kind)
            for out, (name, kind) in zip(outputs, self._kinds.items(), strict=True)
        }

    def close(self) -> None:
        """End the reading thread; the loader gives nothing more."""
        self._loader.close()

    def _tensor(self, out: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Copy out of the pipeline's buffer, which is written again."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        stream = None if self._device is None else torch.cuda.current_stream(self._device)
        self._torch.feed_ndarray(out.as_tensor(), tensor, cuda_stream=stream)
        return tensor

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        """Give the pipeline a batch."""
        batch, self._first = self._first, None
        return tuple(tensor.numpy() for tensor in (batch or next(self._loader)).values())


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MachineError(
            f"--mlr1-loader dali needs NVIDIA DALI, which does not import here ({error}). Install "
            "it (pip install 'megatron_mlr1[dali]'), or leave --mlr1-loader out."
        ) from error
