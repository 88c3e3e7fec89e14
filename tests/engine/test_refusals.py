"""Flags that the engine would answer with a stack trace, or with nothing."""

import importlib.util
from argparse import Namespace
from typing import Any

import pytest

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError, MachineError

cpu.activate()

from megatron_mlr1.engine.refusals import missing, refuse_args, refuse_words  # noqa: E402


def args_of(**other: Any) -> Namespace:
    fields: dict[str, Any] = {"cuda_graph_impl": "none", "optimizer_cpu_offload": False}
    fields |= {"profile": False, "record_memory_history": False, "log_straggler": False}
    fields |= {"transformer_impl": "local", "save_dgrads_interval": None}
    fields |= {"use_precision_aware_optimizer": False, "async_strategy": "mcore"}
    fields |= {"async_save": True, "ffn_hidden_size": 4096, "tensor_model_parallel_size": 1}
    return Namespace(**(fields | other))


def test_tensor_parallelism_divides_the_ffn():
    with pytest.raises(ConfigError, match="3 does not divide the FFN's width of 4096"):
        refuse_args(args_of(tensor_model_parallel_size=3), (), in_cpu_mode=False)
    refuse_args(args_of(tensor_model_parallel_size=2), (), in_cpu_mode=False)


def test_a_flag_that_the_engine_would_take_back_is_refused():
    with pytest.raises(ConfigError, match="Give both, or neither"):
        refuse_args(args_of(async_save=False), ("--async-save",), in_cpu_mode=False)
    refuse_args(args_of(async_save=False), (), in_cpu_mode=False)
    refuse_args(args_of(), ("--async-save",), in_cpu_mode=False)


def test_a_writer_that_is_not_installed_is_named():
    if importlib.util.find_spec("nvidia_resiliency_ext") is not None:
        pytest.skip("nvidia-resiliency-ext is installed")
    with pytest.raises(MachineError, match="pip install nvidia-resiliency-ext"):
        refuse_args(args_of(async_strategy="nvrx"), ("--async-save",), in_cpu_mode=False)


def test_weights_and_biases_needs_a_name_and_its_package():
    with pytest.raises(ConfigError, match="--wandb-exp-name is missing"):
        refuse_words(("--wandb-project", "p"))
    words = ("--wandb-project=p", "--wandb-exp-name", "n")
    if importlib.util.find_spec("wandb") is not None:
        refuse_words(words)
        pytest.skip("wandb is installed")
    with pytest.raises(MachineError, match="pip install wandb"):
        refuse_words(words)


def test_a_package_that_the_engine_misses_is_a_matter_of_the_machine():
    error = missing(ModuleNotFoundError("No module named 'one'"))
    assert "(No module named 'one'). Install it on every node" in str(error)
