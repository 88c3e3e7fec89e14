"""One training run: a plan becomes the engine's words, and its `pretrain` does the rest."""

import platform
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig

import megatron_mlr1
from megatron_mlr1 import cpu
from megatron_mlr1.data.feed import are_packs
from megatron_mlr1.data.mixture import Blend, data_path_words
from megatron_mlr1.data.provenance import read_record
from megatron_mlr1.engine import command_line, machine, mends, refusals, start
from megatron_mlr1.engine.agreement import SHARED
from megatron_mlr1.engine.datasets import MegatronDatasets
from megatron_mlr1.engine.distillation import Distilling
from megatron_mlr1.engine.forward import ForwardStep, foresees_backward
from megatron_mlr1.engine.loaders import Loaders
from megatron_mlr1.engine.metrics import Metrics
from megatron_mlr1.engine.saving import Saving
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.model.build import finish
from megatron_mlr1.model.head_kernels import HeadKernels, HeadRun
from megatron_mlr1.model.shape import ModelShape
from megatron_mlr1.model.spec import Kernel, block_spec, refuse_missing
from megatron_mlr1.options import Mlr1Options, add_mlr1_arguments
from megatron_mlr1.recipes import Plan

OTHER_SCHEDULE = "OptimizerParamScheduler: class input value"
"""How the engine begins to say that a checkpoint has another schedule than the flags."""


def run(plan: Plan, blends: Sequence[Blend], *, rank: int) -> None:
    """Train by a plan, to its end or until a signal.

    Args:
        plan: what `recipes.expand` made of the command line.
        blends: the files of its mixtures; empty where the engine's own flags bring the data.
        rank: this process's place in the whole run.

    Raises:
        Mlr1Error: whatever a person can mend; nothing was trained then.
    """
    mends.apply()
    machine.environment(plan.words)
    words = words_of(plan, blends, announce=rank == 0)
    args, model = _configure(words)
    kernels = _head_kernels(args, plan.options)
    refuse_missing(cast(Kernel, plan.options.kernels["swiglu"]), args.transformer_impl)
    learning = plan.options.distillation
    distilling: Distilling | None = None
    if learning.teacher is not None:
        distilling = Distilling(args, learning, former_teacher=_former_teacher(plan))
    datasets: Loaders | MegatronDatasets
    if plan.dataset == "mlr1":
        datasets = Loaders(args, plan.options, blends, distilling)
    else:
        names = [corpus.name for blend in blends for corpus in blend.corpora]
        datasets = MegatronDatasets(args, plan.options, names)
    try:
        _train(args, model, plan.options, datasets, distilling, kernels)
    finally:
        if distilling is not None:
            distilling.close()


def words_of(plan: Plan, blends: Sequence[Blend], *, announce: bool) -> tuple[str, ...]:
    """Put together all of the engine's words, and write them beside the checkpoints."""
    known = command_line.parser()
    command_line.refuse_unknown(plan.words, known)
    command_line.refuse_misread(plan.words, known)
    own, load = start.without(plan.words, "--load")
    _, save = start.without(own, "--save")
    data = _data_words(plan, blends)
    words = (*machine.words(own), *data, *_defaults(plan, save), *own)
    this_run = start.Run(
        model=str(plan.options.model),
        stage=str(plan.options.stage),
        dataset=plan.dataset,
        words=words,
        versions=_versions(),
        teacher=_former_teacher(plan),
    )
    begin = start.decide(
        run=this_run,
        save=None if save is None else Path(save),
        load=None if load is None else Path(load),
        from_scratch=plan.options.from_scratch,
        needs_load=plan.starts_from,
        new_data_order=plan.options.new_data_order,
    )
    _refuse_no_tokenizer(words, plan.options.data_root)
    if announce:
        print(f"{this_run.model} {this_run.stage} {begin.reason}", flush=True)
        if save is not None:
            this_run.write(Path(save))
    return words + begin.words


def _former_teacher(plan: Plan) -> str:
    """Give the teacher that this run learned from before, "" where it had none.

    Raises:
        ConfigError: there was one, and now there is none.
    """
    options = plan.options
    save, load = (start.without(plan.words, flag)[1] for flag in ("--save", "--load"))
    former = start.former_teacher(
        str(options.model),
        str(options.stage),
        None if save is None else Path(save),
        None if load is None else Path(load),
    )
    if former and options.distillation.teacher is None and not options.distillation.new_teacher:
        raise ConfigError(
            f"This run has learned from the teacher {former}, and --teacher is missing; without it "
            "the objective would change. Give --teacher again, or --kd-new-teacher to go on "
            "without."
        )
    return former


def _data_words(plan: Plan, blends: Sequence[Blend]) -> tuple[str, ...]:
    """Say in the engine's words which data are read, by whom, and whether documents are masked."""
    words = data_path_words(blends[0].corpora) if blends else ()
    if plan.dataset == "mlr1":
        words += ("--dataloader-type", "external")
    corpora = [corpus for blend in blends for corpus in blend.corpora]
    if plan.options.document_mask:
        words += ("--dataloader-inter-document-masking", "--eod-mask-loss")
    elif any(are_packs(read_record(str(corpus.prefix))) for corpus in corpora):
        words += ("--dataloader-inter-document-masking",)
    return words


def _defaults(plan: Plan, save: str | None) -> tuple[str, ...]:
    """Give the flags whose value follows from where data and checkpoints lie."""
    chosen: list[str] = []
    root = plan.options.data_root
    if root is not None and (root / "tokenizer").is_dir():
        chosen += ["--tokenizer-model", str(root / "tokenizer")]
    if save is not None:
        chosen += ["--tensorboard-dir", str(Path(save) / "tensorboard")]
    return tuple(chosen)


def _refuse_no_tokenizer(words: Sequence[str], data_root: Path | None) -> None:
    """Say where the tokenizer may lie, which the engine does not."""
    if start.without(words, "--tokenizer-type")[1] != "HuggingFaceTokenizer":
        return
    model = start.without(words, "--tokenizer-model")[1]
    if model is None:
        place = "DATA_ROOT/tokenizer" if data_root is None else str(data_root / "tokenizer")
        raise ConfigError(
            f"There is no tokenizer: {place} is not a folder and --tokenizer-model is missing. Put "
            "the Hugging Face folder of the tokenizer that made the corpora there, or give "
            "--tokenizer-model DIR."
        )
    if model.startswith(("/", ".")) and not Path(model).is_dir():
        raise ConfigError(
            f"--tokenizer-model {model} is not a folder. Give the Hugging Face folder of the "
            "tokenizer that made the corpora, or its name on the hub."
        )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": metadata.version("megatron-core"),
        "megatron_mlr1": megatron_mlr1.__version__,
    }


def _configure(words: Sequence[str]) -> tuple[Namespace, GPTModelConfig]:
    """Have the engine parse and judge the words, and turn its refusals into ours."""
    refusals.refuse_words(words)
    sys.argv = [sys.argv[0], *words]
    with refusals.in_words():
        args = parse_and_validate_args(extra_args_provider=add_mlr1_arguments)
        model = gpt_config_from_args(args)
    refusals.refuse_args(args, words, in_cpu_mode=cpu.is_active())
    finish(model.transformer)
    if args.dataloader_inter_document_masking:
        # Stages hand on [B * S, 1, H] then, where the engine expects [S, B, H].
        model.transformer.variable_seq_lengths = True
    return args, model


def _head_kernels(args: Namespace, options: Mlr1Options) -> HeadKernels:
    """Take the head's implementations, if they can work in this run."""
    kernels = HeadKernels.of(options.kernels, options.logits)
    run = HeadRun(
        tensor_parallel=args.tensor_model_parallel_size,
        fp16=args.fp16,
        whole_step_graph=args.cuda_graph_impl == "full_iteration",
        packed=args.dataloader_inter_document_masking,
        distils=options.distillation.teacher is not None,
        sparse=options.distillation.form in ("hybrid", "top_k"),
        fsdp=args.use_megatron_fsdp,
    )
    kernels.refuse(run)
    return kernels


def _train(
    args: Namespace,
    model: GPTModelConfig,
    options: Mlr1Options,
    datasets: Loaders | MegatronDatasets,
    distilling: Distilling | None,
    kernels: HeadKernels,
) -> None:
    layers = {f"{op}_kernel": options.kernels[op] for op in ("swiglu", "qk_norm_rope")}
    model.transformer_layer_spec = partial(_layers, kernels=layers)
    peak = machine.peak_tflops(options.peak_tflops)
    shape = shape_of(args)
    with refusals.in_words():
        config = pretrain_cfg_container_from_args(args, model)
    Saving(args, shape.num_parameters()).install()
    Metrics(args, shape, datasets, peak, distilling).install()
    if distilling is not None:
        distilling.install()
    try:
        pretrain(
            config,
            datasets,
            ModelType.encoder_or_decoder,
            ForwardStep(args, kernels, distilling, foresees=foresees_backward(args)),
        )
    except ImportError as error:
        raise refusals.missing(error) from error
    except AssertionError as error:
        if OTHER_SCHEDULE not in str(error):
            raise
        changed = ConfigError(
            f"The checkpoint is of another schedule ({str(error).strip()}): its --train-iters, "
            "batch size, warm-up, decay or weight decay is not this run's. Give the former ones, "
            "or --override-opt-param-scheduler to take the new ones from here on."
        )
        changed.add_note(SHARED)
        raise changed from error


def _layers(model: Any, vp_stage: int | None = None, *, kernels: Mapping[str, Any]) -> Any:
    """Give the engine's builder the layers of one stage."""
    return block_spec(model.transformer, vp_stage=vp_stage, **kernels)


def shape_of(args: Namespace) -> ModelShape:
    """Read the model's sizes from the engine's validated arguments."""
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        vocab_size=args.padded_vocab_size,
    )
