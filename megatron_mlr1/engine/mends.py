"""Faults of Megatron-Core 0.19 that would stop or spoil our runs, each mended in one function.

Every mend says what is wrong and where it does not apply; drop it when the engine has its own.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import megatron.core.datasets.utils
import megatron.training.training
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import gpt_model
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.rerun_state_machine import RerunMode
from megatron.training import checkpointing

from megatron_mlr1.engine.tracker import WholeTracker
from megatron_mlr1.engine.writer_queue import results_queue


def apply() -> None:
    """Mend the engine in this process; a second call changes nothing."""
    _keep_compiled_dataset_helpers()
    _save_on_sigterm()
    _say_why_a_file_was_not_written()
    _write_tracker_whole()
    _know_the_rerun_mode_of_the_flag()
    _warm_up_without_drawing()
    logging.getLogger(gpt_model.__name__).setLevel(logging.ERROR)  # it warns of its own future
    if HAVE_APEX_OR_TE:
        _prepare_optimizers(_fit_groups_after_loads, "fits_groups")
    else:
        _prepare_optimizers(_make_torch_adam_resumable, "makes_resumable")
        _load_torch_adam_without_step()


def _keep_compiled_dataset_helpers() -> None:
    """Stop the engine from compiling what its wheel brings compiled.

    It runs `make` in a folder that has no Makefile in the wheel, and exits the process.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        megatron.core.datasets.utils.compile_helpers = _nothing_to_compile


def _nothing_to_compile() -> None:
    pass


def _save_on_sigterm() -> None:
    """Keep the checkpoint writers' queue alive when a launcher terminates the whole session.

    `torchrun` signals the process group, so the engine's queue dies while the training process
    catches the signal and saves: BrokenPipeError, and no checkpoint.
    """
    filesystem_async.get_write_results_queue = results_queue


def _say_why_a_file_was_not_written() -> None:
    """Carry the disk's own words out of a checkpoint writer.

    The engine keeps the class of the error alone: "<class 'OSError'>".
    """
    writer = filesystem_async.FileSystemWriterAsync
    write = writer.write_preloaded_data
    if getattr(write, "says_why", False):
        return

    def say_why(*args: Any, **kwargs: Any) -> Any:
        done = write(*args, **kwargs)
        # With a queue it is a thread, whose answer is there.
        if kwargs["results_queue"] is None and isinstance(done[1], Exception):
            raise _of_the_disk(done[1])
        return done

    say_why.says_why = True  # type: ignore[attr-defined]
    writer.write_preloaded_data = staticmethod(say_why)


def _of_the_disk(error: BaseException) -> BaseException:
    """Find what the disk answered, behind which torch complains of its own file's form."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return error if cause is None else cause


def _write_tracker_whole() -> None:
    """Let the file that names the newest checkpoint have its old text or its new one.

    The engine empties it and then writes: on a full disk, or where the run is killed in between,
    all checkpoints of the folder are lost to the next run.
    """
    if not isinstance(checkpointing.maybe_msc, WholeTracker):
        checkpointing.maybe_msc = WholeTracker(checkpointing.maybe_msc)


def _know_the_rerun_mode_of_the_flag() -> None:
    """Understand `--rerun-mode report_stats`, whose word in the engine's enumeration is another."""
    RerunMode._missing_ = classmethod(_rerun_mode)


def _rerun_mode(kind: Any, value: object) -> Any:
    return kind.REPORT_DETERMINISM_STATS if value == "report_stats" else None


def _warm_up_without_drawing() -> None:
    """Give back the random numbers that the engine's warm-up of fused functions draws.

    Where weights are drawn on the CPU they would come from what is left of the same generator, so
    that one seed gives other weights with another micro batch or sequence length.
    """
    training = megatron.training.training
    warm_up = training.set_jit_fusion_options
    if getattr(warm_up, "gives_back", False):
        return

    def give_back(*args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=()):
            warm_up(*args, **kwargs)

    give_back.gives_back = True  # type: ignore[attr-defined]
    training.set_jit_fusion_options = give_back


def _prepare_optimizers(prepare: Callable[[Any], None], name: str) -> None:
    """Have each optimizer prepared as soon as it is made; `name` marks that it is done."""
    training = megatron.training.training
    make = training.get_megatron_optimizer
    if getattr(make, name, False):
        return

    def make_prepared(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if part.optimizer is not None:
                prepare(part)
        return optimizer

    setattr(make_prepared, name, True)
    training.get_megatron_optimizer = make_prepared


def _fit_groups_after_loads(part: Any) -> None:
    """Let Transformer Engine's and Apex's Adam go on from what torch's wrote.

    A load replaces the optimizer's groups by those of the checkpoint. Torch's have no
    `bias_correction`, without which the next step is a KeyError, and count steps in a float, which
    the kernel does not take.
    """
    part.optimizer.register_load_state_dict_post_hook(fit_groups)


def _make_torch_adam_resumable(part: Any) -> None:
    """Prepare torch's Adam for a resume.

    With it (neither Transformer Engine nor Apex there), the distributed optimizer cannot load
    before its first step, and after a load all parameters share one `step` tensor, which each of
    them then counts up: the bias correction is wrong and training diverges without a word.
    """
    if isinstance(part, DistributedOptimizer):
        initialise_state(part.optimizer)
        part.optimizer.register_load_state_dict_post_hook(separate_steps)


def _load_torch_adam_without_step() -> None:
    """Let the distributed optimizer load torch Adam's moments.

    The loader hands over every state tensor but `step`, which is loaded elsewhere, and then looks
    for all that the optimizer has, `step` among them: a KeyError.
    """
    load = DistributedOptimizer._set_main_param_and_optimizer_states
    if getattr(load, "leaves_step", False):
        return

    def leave_step(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        load(self, model_param, {"step": None, **tensors})

    leave_step.leaves_step = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = leave_step


def initialise_state(adam: torch.optim.Optimizer) -> None:
    """Give each parameter the state that Adam would give it in its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def separate_steps(adam: torch.optim.Optimizer) -> None:
    """Give each parameter a step tensor of its own."""
    for state in adam.state.values():
        state["step"] = state["step"].clone()


def fit_groups(adam: torch.optim.Optimizer) -> None:
    """Give each group what another implementation's lack, and a whole number of steps."""
    for group in adam.param_groups:
        for name, value in adam.defaults.items():
            group.setdefault(name, value)
        if isinstance(group.get("step"), float):
            group["step"] = int(group["step"])
