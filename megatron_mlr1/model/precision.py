"""Transformer Engine: whether it is here. The one place that asks."""

from functools import cache
from importlib import import_module, metadata


@cache
def transformer_engine_version() -> str | None:
    """Give the version of an importable Transformer Engine, or None.

    A package that is installed but does not import (another CUDA, another torch) counts as absent;
    `python -m megatron_mlr1.doctor` shows why.
    """
    try:
        import_module("transformer_engine.pytorch")
        return metadata.version("transformer_engine")
    except (ImportError, OSError, metadata.PackageNotFoundError):
        return None
