"""Flags that the engine would answer with a stack trace, or with nothing."""

import importlib.util
from argparse import Namespace
from typing import Any

import pytest

from megatron_mlr1 import cpu
from megatron_mlr1.errors import ConfigError, MachineError

cpu.activate()

from megatron_mlr1.checkpoint.megatron import FIXED  # noqa: E402
from megatron_mlr1.engine.refusals import missing, refuse_args, refuse_words  # noqa: E402


def args_of(**other: Any) -> Namespace:
    fields: dict[str, Any] = {"cuda_graph_impl": "none", "optimizer_cpu_offload": False}
    fields |= {"profile": False, "record_memory_history": False, "log_straggler": False}
    fields |= {"transformer_impl": "local", "save_dgrads_interval": None}
    fields |= {"use_precision_aware_optimizer": False, "async_strategy": "mcore"}
    fields |= {"async_save": True, "ffn_hidden_size": 4096, "tensor_model_parallel_size": 1}
    fields |= {"use_megatron_fsdp": False}
    fields |= {"seed": 1, "optimizer": "adam"}
    return Namespace(**(fields | FIXED | other))


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


def test_a_flag_that_does_nothing_is_refused_with_the_one_that_does():
    for words in (("--rampup-batch-size", "8", "8", "64"), ("--rampup-batch-size=8", "8", "64")):
        with pytest.raises(ConfigError, match=r"does nothing.*--step-batch-size-schedule"):
            refuse_words(words)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"untie_embeddings_and_output_weights": True}, "has False.*Leave out the flag"),
        ({"window_size": (8, 0)}, "window_size is"),
        ({"no_rope_freq": 4}, "no_rope_freq is 4"),
        ({"seed": 0}, "--seed is 0"),
        ({"optimizer": "sgd"}, "adam is the recipes"),
    ],
    ids=str,
)
def test_what_would_end_in_a_trace_or_could_not_be_converted_is_refused(other, message):
    with pytest.raises(ConfigError, match=message):
        refuse_args(args_of(**other), (), in_cpu_mode=False)


def test_layers_that_only_a_spec_names_are_refused():
    with pytest.raises(ConfigError, match="attention is torch's"):
        refuse_words(("--attention-backend", "local"))
    refuse_words(("--attention-backend", "flash"))


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
