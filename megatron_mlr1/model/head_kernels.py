"""Which implementation computes the losses of the head, and where each of them works."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.ops.libraries import require

LIBRARIES = ("liger", "quack", "te")
"""Implementations that are a package of somebody else's."""

OF_ENGINE = ("reference", "te")
"""Implementations that have the engine's output layer make the logits."""

ONE_SHARD = (
    ("linear_cross_entropy", "liger"),
    ("linear_cross_entropy", "quack"),
    ("linear_kl", "reference"),
    ("linear_kl", "liger"),
)
"""Ops and implementations that know no split vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRun:
    """What a run asks of its head."""

    tensor_parallel: int
    """Processes that share the vocabulary."""

    fp16: bool
    """Whether the model is fp16, with a loss scale."""

    whole_step_graph: bool
    """Whether a CUDA graph holds the whole iteration."""

    packed: bool
    """Whether documents are kept apart, packs of chats included."""

    distils: bool
    """Whether there is a teacher."""

    sparse: bool = False
    """Whether its targets are sparse."""

    fsdp: bool = False
    """Whether every weight is split over the replicas, and whole for its layer's call alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadKernels:
    """The implementations that a run chose."""

    cross_entropy: str = "mlr1"
    """Of `--mlr1-kernels linear_cross_entropy`: "mlr1" is the fused op, "reference" the engine's
    output layer and its cross-entropy over a tensor of all logits, "te" the same with Transformer
    Engine's cross-entropy, the others are libraries."""

    divergence: str = "mlr1"
    """Of `--mlr1-kernels linear_kl`: "mlr1" is the fused op, which has the cross-entropy too;
    "reference" is the definition over tensors of all logits, "liger" a library."""

    logits: str = "fp32"
    """Of `--mlr1-logits`: in what the fused ops keep a chunk of logits."""

    @classmethod
    def of(cls, kernels: Mapping[str, str], logits: str) -> Self:
        """Take the head's part of the run's options."""
        return cls(
            cross_entropy=kernels["linear_cross_entropy"],
            divergence=kernels["linear_kl"],
            logits=logits,
        )

    @property
    def logits_dtype(self) -> torch.dtype | None:
        """Give what `Chunks.logits` takes."""
        return torch.bfloat16 if self.logits == "bf16" else None

    def refuse(self, run: HeadRun) -> None:
        """Refuse what cannot work, before anything is allocated.

        Raises:
            ConfigError: a choice does not go with another one.
            MachineError: a library that was chosen does not run here.
        """
        self._refuse_graph(run)
        self._refuse_fsdp(run)
        chosen = {"linear_cross_entropy": self.cross_entropy}
        if run.distils:
            chosen["linear_kl"] = self.divergence
        if self.logits == "bf16" and run.fp16:
            raise ConfigError(
                "--mlr1-logits bf16 goes with a model in bf16 or fp32; this one is fp16, whose "
                "products a GPU does not hand out in bf16. Leave the flag out."
            )
        if self.logits == "bf16" and "mlr1" not in chosen.values():
            raise ConfigError(
                "--mlr1-logits bf16 speaks of the mlr1 kernels' logits, and --mlr1-kernels has "
                "other kernels for every loss of this run. Leave one of the two flags out."
            )
        for op, name in chosen.items():
            if run.tensor_parallel > 1 and (op, name) in ONE_SHARD:
                raise ConfigError(
                    f"--mlr1-kernels {op}={name} knows no split vocabulary, and "
                    f"--tensor-model-parallel-size is {run.tensor_parallel}. Choose {op}=mlr1, or "
                    "run without tensor parallelism."
                )
            if name in LIBRARIES:
                require(name)
        if run.distils and run.sparse and self.divergence != "mlr1":
            raise ConfigError(
                f"--mlr1-kernels linear_kl={self.divergence} takes the teacher's hidden states "
                "alone, and --kd-form asks for sparse targets. Choose linear_kl=mlr1, or --kd-form "
                "hidden."
            )

    def _refuse_fsdp(self, run: HeadRun) -> None:
        if not run.fsdp:
            return
        fused = "--use-megatron-fsdp does not go with"
        why = (
            "it makes the head's weight whole for a call of the engine's output layer alone, and "
            "these losses read it without one"
        )
        if run.distils:
            raise ConfigError(
                f"{fused} --teacher: {why}. Take --use-distributed-optimizer in its place."
            )
        if self.cross_entropy not in OF_ENGINE:
            raise ConfigError(
                f"{fused} --mlr1-kernels linear_cross_entropy={self.cross_entropy}: {why}. Take "
                "--use-distributed-optimizer in its place, or choose "
                "linear_cross_entropy=reference."
            )

    def _refuse_graph(self, run: HeadRun) -> None:
        if not run.whole_step_graph:
            return
        reasons = {
            "with --teacher: targets come from outside the graph, at every step others": (
                run.distils
            ),
            "with documents kept apart: their bounds are read on the host, at every step others": (
                run.packed
            ),
            "with --mlr1-kernels linear_cross_entropy=liger: it counts tokens on the host": (
                self.cross_entropy == "liger"
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(
                    f"--cuda-graph-impl full_iteration does not go {reason}. Choose "
                    "--cuda-graph-impl local, whose graphs hold the layers and leave the head out."
                )
