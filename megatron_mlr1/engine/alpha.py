"""The share of the divergence in the loss, over a run."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal, Self

from megatron_mlr1.distillation_options import DistillationOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaSchedule:
    """A function of the samples that the run has consumed, so that a resumed run goes on in it.

    constant   peak
    linear     from peak to end over the run
    wsd        from 0 to peak in the warm-up, peak, and from peak to end in the decay (after
               "Pre-training Distillation for Large Language Models", arXiv:2410.16215)
    """

    kind: Literal["constant", "linear", "wsd"]
    peak: float
    end: float
    samples: int
    """Of the whole run."""
    warmup: int
    """Samples of the warm-up."""
    decay: int
    """Samples of the decay, at the end."""

    @classmethod
    def of(cls, args: Namespace, options: DistillationOptions) -> Self:
        """Take the run's length and warm-up from the engine's validated arguments."""
        samples = args.train_samples or args.train_iters * args.global_batch_size
        if args.lr_warmup_fraction is not None:
            warmup = int(args.lr_warmup_fraction * samples)
        else:
            warmup = args.lr_warmup_samples or args.lr_warmup_iters * args.global_batch_size
        return cls(
            kind=options.schedule,
            peak=options.alpha,
            end=options.alpha_end,
            samples=samples,
            warmup=warmup,
            decay=int(options.decay * samples),
        )

    def at(self, consumed: int) -> float:
        """Give the share in the step that begins when so many samples have been consumed."""
        if self.kind == "constant":
            return self.peak
        if self.kind == "linear":
            return self._towards_end(consumed / self.samples)
        if consumed < self.warmup:
            return self.peak * consumed / self.warmup
        left = self.samples - consumed
        return self.peak if left >= self.decay else self._towards_end(1 - left / self.decay)

    def _towards_end(self, part: float) -> float:
        part = min(max(part, 0.0), 1.0)
        return self.peak + (self.end - self.peak) * part
