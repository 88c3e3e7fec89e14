"""Transformer Engine: whether it is here. The one place that asks."""

from functools import cache
from importlib import import_module, metadata

from megatron_mlr1 import cpu
from megatron_mlr1.errors import MachineError


@cache
def transformer_engine_version() -> str | None:
    """Give the version of an importable Transformer Engine, or None; in CPU mode always None.

    Raises:
        MachineError: it is installed and does not import. Where it is, the engine imports it too.
    """
    if cpu.is_active():
        return None
    try:
        version = metadata.version("transformer_engine")
    except metadata.PackageNotFoundError:
        return None
    try:
        import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever it raises: it ends the engine, too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(
            f"Transformer Engine {version} is installed but does not import ({reason}). It must "
            "fit this torch and its CUDA: install it again (pip install --no-build-isolation "
            "'megatron_mlr1[fp8]'), or remove it to train with torch's layers (pip uninstall "
            "transformer_engine transformer_engine_torch)."
        ) from error
    return version
