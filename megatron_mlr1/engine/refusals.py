"""Flags of the engine's that are refused in words.

They would end in its stack trace here, do nothing, or train what cannot be converted.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from megatron_mlr1.checkpoint.architecture import check_fields
from megatron_mlr1.checkpoint.megatron import REQUIRED
from megatron_mlr1.engine.start import without
from megatron_mlr1.errors import CheckpointError, ConfigError, MachineError
from megatron_mlr1.model.precision import transformer_engine_version

INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "--spec": "names layers of another model, and this program builds MobileLLM-R1's. Leave "
        "it out; --mlr1-kernels chooses the implementations.",
        "--yaml-cfg": "takes the place of all flags, the recipe's too. Leave it out, and give "
        "your own numbers by --recipe FILE (docs/recipe.md).",
        "--rampup-batch-size": "does nothing in Megatron-Core 0.19. Give "
        "--step-batch-size-schedule 'TOKENS:BATCH TOKENS:BATCH ...' with --train-samples and "
        "--lr-warmup-samples.",
        "--sft": "is of the engine's own script for chats. Leave it out; the stages sft_general "
        "and sft_reasoning train on packs of chats (docs/finetuning.md).",
        "--adlr-autoresume": "asks a package of NVIDIA's own clusters, and without it the engine "
        "ends before the first step, with status 0. Leave it out; the same command goes on from "
        "the last checkpoint.",
        "--use-torch-fsdp2": "asks for a head of its own, and a MobileLLM-R1's is its embedding. "
        "Take --use-distributed-optimizer in its place.",
        "--init-model-with-meta-device": "leaves the weights without values. Leave it out.",
        "--no-initialization": "leaves weights as the memory was wherever no checkpoint gives "
        "them. Leave it out.",
        "--init-method-xavier-uniform": "is not taken by the configuration of Megatron-Core 0.19. "
        "Leave it out; weights start from N(0, --init-method-std).",
        "--config-logger-dir": "cannot write the model's settings in Megatron-Core 0.19 (they hold "
        "process groups). Leave it out; run.json in the folder of --save has all flags.",
        "--inprocess-restart": "is of the engine's own scripts, and this program has no part in "
        "it. Leave it out; the same command goes on from the last checkpoint, and torchrun's "
        "--max-restarts gives it again.",
    }
)
"""Flags that are refused whatever stands beside them: why, and what to do instead."""


def refuse_words(words: Sequence[str]) -> None:
    """Refuse what the engine would meet while it parses, on one process of several.

    Raises:
        ConfigError: a flag that has no place here, or lacks another.
        MachineError: a package is missing.
    """
    for flag, why in INSTEAD.items():
        if any(word.split("=")[0] == flag for word in words):
            raise ConfigError(f"{flag} {why}")
    if without(words, "--attention-backend")[1] == "local":
        raise ConfigError(
            "--attention-backend local asks for layers that --spec names, and this program brings "
            "its own. Leave it out: without Transformer Engine attention is torch's."
        )
    if not without(words, "--wandb-project")[1]:
        return
    if not without(words, "--wandb-exp-name")[1]:
        raise ConfigError(
            "--wandb-project is given, and --wandb-exp-name is missing; a run has a name there. "
            "Give one."
        )
    if not _is_installed("wandb"):
        raise MachineError(
            "--wandb-project writes to Weights & Biases, whose package is not installed. Install "
            "it (pip install wandb) on every node, or leave the flag out: --tensorboard-dir and "
            "metrics.jsonl hold the same figures."
        )


@contextmanager
def in_words() -> Iterator[None]:
    """Make what the engine refuses, as it reads its flags, one error.

    Raises:
        ConfigError: an assertion or error of the engine's.
        MachineError: a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise missing(error) from error
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error).rstrip(". ") or "an assertion without a message"
        raise ConfigError(
            f"Megatron-Core refuses these flags: {reason}. Change the flag that it names; `--help` "
            "lists them all."
        ) from error


def refuse_args(args: Namespace, words: Sequence[str], *, in_cpu_mode: bool) -> None:
    """Refuse what the engine's own checks let through.

    Args:
        args: the engine's, validated.
        words: what was parsed; the engine's checks take some flags back.
        in_cpu_mode: whether the CPU stands for the GPU.

    Raises:
        ConfigError: a flag that cannot do here what it says.
        MachineError: a package is missing.
    """
    _refuse_another_architecture(args)
    ffn, tensor = args.ffn_hidden_size, args.tensor_model_parallel_size
    if ffn % tensor:
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor} does not divide the FFN's width of {ffn}. "
            "docs/training.md lists the sizes that fit each model."
        )
    if args.seed < 1:
        raise ConfigError(f"--seed is {args.seed}; it must be 1 or more.")
    if args.optimizer == "sgd":
        raise ConfigError(
            "--optimizer sgd cannot be shared out over processes by Megatron-Core 0.19, nor go on "
            "from its own checkpoint. Leave it out; adam is the recipes'."
        )
    if in_cpu_mode:
        _refuse_what_asks_a_gpu(args, words)
    if transformer_engine_version() is None:
        _refuse_what_asks_transformer_engine(args)
    if "--async-save" not in words:
        return
    if not args.async_save:
        raise ConfigError(
            "--async-save is given without --use-persistent-ckpt-worker, and the engine saves "
            "without it then, as if it were not there. Give both, or neither."
        )
    if args.async_strategy == "nvrx" and not _is_installed("nvidia_resiliency_ext"):
        raise MachineError(
            "--async-save writes by the package nvidia-resiliency-ext, which is not installed. "
            "Install it (pip install nvidia-resiliency-ext), or give --async-strategy mcore for "
            "the engine's own writer."
        )


def _refuse_another_architecture(args: Namespace) -> None:
    """Refuse before the training what would be refused after it, by the conversion."""
    try:
        check_fields(vars(args), REQUIRED, where="this run")
    except CheckpointError as error:
        raise ConfigError(f"{error} Leave out the flag that changes it.") from error


def _refuse_what_asks_a_gpu(args: Namespace, words: Sequence[str]) -> None:
    why: str | None = None
    if args.cuda_graph_impl != "none":
        why = f"--cuda-graph-impl {args.cuda_graph_impl} records what a GPU does"
    elif args.optimizer_cpu_offload:
        why = "--optimizer-cpu-offload moves the optimizer from a GPU to the CPU"
    elif args.profile and not args.use_pytorch_profiler:
        why = "--profile without --use-pytorch-profiler speaks to a GPU's profiler"
    elif args.record_memory_history:
        why = "--record-memory-history records the memory of a GPU"
    elif args.use_megatron_fsdp:
        why = "--use-megatron-fsdp reduces gradients as only a GPU's NCCL can"
    elif args.log_straggler:
        why = "--log-straggler compares clocks and temperatures of GPUs"
    elif "--async-save" in words:
        why = "--async-save writes from a process that takes a GPU of its own accord"
    if why is not None:
        raise ConfigError(f"{why}, and there is none in CPU mode. Leave the flag out.")


def _refuse_what_asks_transformer_engine(args: Namespace) -> None:
    if args.transformer_impl == "transformer_engine":
        raise ConfigError(
            "--transformer-impl transformer_engine is given, and there is none here; in CPU mode "
            "there never is. Leave the flag out, or install it on a machine with a GPU (pip "
            "install --no-build-isolation 'megatron_mlr1[fp8]')."
        )
    if args.save_dgrads_interval:
        raise ConfigError(
            "--save-dgrads-interval watches Transformer Engine's layers, and there are none here. "
            "Leave it out; --save-wgrads-interval does without them."
        )
    if args.use_precision_aware_optimizer:
        raise ConfigError(
            "--use-precision-aware-optimizer is Transformer Engine's Adam, and there is none here. "
            "Leave it out; torch's Adam keeps its moments in fp32."
        )


def missing(error: ImportError) -> MachineError:
    """Say that the engine looked for a package that is not there."""
    return MachineError(
        f"A flag of this run needs a package that is not here ({str(error).rstrip('. ')}). Install "
        "it on every node, or leave the flag out."
    )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
