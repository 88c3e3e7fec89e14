"""Which micro batch keeps the global batch what the recipe says, on any number of devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from megatron_mlr1.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How many devices there are, and how many share one copy of the model."""

    world_size: int
    """Devices, that is processes, of the whole run."""

    model_parallel: int
    """Tensor x pipeline x context parallel size."""

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.model_parallel < 1:
            raise ConfigError(
                f"{self.world_size} processes with {self.model_parallel} to a copy of the model: "
                "both must be at least 1. Correct the parallel sizes."
            )
        if self.world_size % self.model_parallel:
            below = self.world_size // self.model_parallel * self.model_parallel
            near = [size for size in (below, below + self.model_parallel) if size]
            raise ConfigError(
                f"{self.world_size} processes do not split into copies of the model of "
                f"{self.model_parallel} (tensor x pipeline x context parallel size). "
                f"Start {_either(near)} processes, or change the parallel sizes."
            )

    @property
    def data_parallel(self) -> int:
        """Copies of the model."""
        return self.world_size // self.model_parallel


def largest_micro_batch(global_batch: int, bound: int, layout: Layout) -> int:
    """Find the largest micro batch up to `bound` that divides a device's share of `global_batch`.

    Args:
        global_batch: sequences of one step over all devices.
        bound: the paper's sequences per device.
        layout: the devices.

    Raises:
        ConfigError: no micro batch keeps the global batch; names the nearest numbers of processes
            that can.
    """
    if global_batch < 1 or bound < 1:
        raise ConfigError(
            f"--global-batch-size is {global_batch} and --micro-batch-size {bound}; both must be "
            "at least 1. Correct them, or leave them to the recipe."
        )
    share, rest = divmod(global_batch, layout.data_parallel)
    if rest:
        near = _either(_near_sizes(global_batch, layout))
        raise ConfigError(
            f"A global batch of {global_batch} sequences does not split over "
            f"{layout.data_parallel} copies of the model ({layout.world_size} processes, "
            f"{layout.model_parallel} to a copy). Start {near} "
            "processes, or give another global batch, which changes the recipe."
        )
    return next(size for size in range(min(bound, share), 0, -1) if share % size == 0)


def scheduled_batches(schedule: str) -> tuple[int, ...]:
    """Read the global batches of `--step-batch-size-schedule`, `THRESHOLD:BATCH ...`.

    As the engine reads them, which is not loaded where a plan is made. What it takes for none is
    left out here: it refuses the whole with its reason.
    """
    factors = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    batches = []
    for entry in schedule.upper().replace(",", " ").split():
        text = entry.partition(":")[2]
        try:
            number = float(text.rstrip("KMBT")) * factors.get(text[-1:], 1)
            batches.append(int(number))
        except (ValueError, OverflowError):
            continue
    return tuple(batch for batch in batches if batch > 0)


def fitting_micro_batch(batches: Sequence[int], bound: int, layout: Layout) -> int:
    """Find the largest micro batch up to `bound` that makes up every one of several global batches.

    Raises:
        ConfigError: as `largest_micro_batch`.
    """
    for batch in batches:
        largest_micro_batch(batch, bound, layout)
    return largest_micro_batch(gcd(*batches), bound, layout)


def refuse_misfit(global_batch: int, micro_batch: int, layout: Layout) -> None:
    """Refuse a micro batch that somebody asked for and that cannot make up the global batch.

    Raises:
        ConfigError: names the largest micro batch below that can.
    """
    best = largest_micro_batch(global_batch, max(micro_batch, 1), layout)
    if best != micro_batch:
        raise ConfigError(
            f"--micro-batch-size {micro_batch} on {layout.data_parallel} copies of the model does "
            f"not divide the global batch of {global_batch} sequences. Give {best}, or leave "
            "--micro-batch-size out."
        )


def _near_sizes(global_batch: int, layout: Layout) -> list[int]:
    """Name the nearest world sizes below and above that divide the global batch."""
    divisors = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
    below = [size for size in divisors if size < layout.data_parallel]
    above = [size for size in divisors if size > layout.data_parallel]
    return [size * layout.model_parallel for size in (*below[-1:], *above[:1])]


def _either(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes)
