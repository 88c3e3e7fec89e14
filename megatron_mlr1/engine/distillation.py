"""A teacher in a run: opened before the first step, asked ahead, agreed on by all ranks.

The data loader of the last pipeline stage is wrapped by a `Lookahead`; each step begins with all
ranks agreeing on its branch and ends with a line of the ledger. A checkpoint holds nothing of it.
"""

import inspect
import struct
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.training.training
import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.engine import start, teacher_choice
from megatron_mlr1.engine.agreement import agreed
from megatron_mlr1.engine.alpha import AlphaSchedule
from megatron_mlr1.engine.groups import Place, place
from megatron_mlr1.engine.lessons import Lessons, head_shard
from megatron_mlr1.errors import ConfigError, Mlr1Error, TeacherError
from megatron_mlr1.losses.distillation import Lesson
from megatron_mlr1.teacher.addresses import open_backend
from megatron_mlr1.teacher.agreement import Agreement, Branch
from megatron_mlr1.teacher.backend import TeacherBackend
from megatron_mlr1.teacher.ledger import Digest, Entry, Ledger, combine
from megatron_mlr1.teacher.lookahead import Ahead, Lookahead, row_requests
from megatron_mlr1.teacher.spec import TargetRequest, TeacherIdentity, bytes_per_token

Batch = dict[str, Any]

COUNTS = ("replicas", "failovers", "hedges", "ejected", "from_store")
"""What a record shows of a backend's statistics, where it has them."""

_REPORT = struct.Struct(f"<??16s16s{1 + len(COUNTS)}d")
"""What a rank says of a step: whether it asks, whether its digests count, digests, figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """One rank's part in a step."""

    asks: bool
    counts: bool
    """Context-parallel ranks ask for the same sequences; the first one's digests count."""
    tokens: bytes
    targets: bytes
    figures: tuple[float, ...]
    """Milliseconds of waiting, then `COUNTS`."""

    def pack(self) -> Tensor:
        """Give the bytes for an all-gather."""
        packed = _REPORT.pack(self.asks, self.counts, self.tokens, self.targets, *self.figures)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: Tensor) -> "_Report":
        """Read what another rank packed."""
        asks, counts, tokens, targets, *figures = _REPORT.unpack(packed.numpy().tobytes())
        return cls(asks=asks, counts=counts, tokens=tokens, targets=targets, figures=tuple(figures))


class Distilling:
    """The teacher's part in a run, on every rank."""

    def __init__(
        self, args: Namespace, options: DistillationOptions, *, former_teacher: str
    ) -> None:
        """Take what the run says; nothing is opened before `open`.

        Args:
            args: the engine's, validated; read again in `open`, when a checkpoint has been loaded.
            options: of the run; it has a teacher.
            former_teacher: fingerprint of the teacher that the run learned from before, "" if none.
        """
        self._args, self._options = args, options
        self._former_teacher = "" if options.new_teacher else former_teacher
        self._alpha = AlphaSchedule.of(args, options)
        self._branch = Branch.KD
        self._backend: TeacherBackend | None = None
        self._lookahead: Lookahead[Batch] | None = None
        self._lessons: Lessons | None = None
        self._ledger: Ledger | None = None
        self._mistake: Mlr1Error | None = None
        self._has_given_up = False
        self._tokens, self._targets = Digest(), Digest()
        self._seen: set[object] = set()
        self._wait_s = 0.0
        self.num_ids = 0
        """Ids that student and teacher both have."""
        self.head: Tensor | None = None
        """This process's rows of the teacher's head, on the last stage, for hidden states."""
        self.figures: dict[str, object] = {}
        """What the record shows of the last step."""

    # Before the first step.

    def open(self) -> None:
        """Open the teacher, bring its head, and read the ledger; all ranks call, once.

        Raises:
            Mlr1Error: no teacher answers, or not the one that this run can learn from; on all
                ranks.
        """
        if self._lessons is not None:
            return
        args, here = self._args, place()
        self._here, self._group = here, dist.new_group(backend="gloo")
        asks = here.is_last_stage and here.tensor_rank == 0
        self._backend = agreed(lambda: self._open_backend() if asks else None)
        identity = self._same_identity()
        self._refuse_small_buffer(identity)
        self.num_ids = min(args.padded_vocab_size, identity.vocab_size)
        spec = teacher_choice.target_spec(args, self._options)
        if here.is_last_stage and not spec.is_sparse:
            self.head = head_shard(
                self._backend,
                identity,
                spec,
                here,
                self.num_ids,
                args.padded_vocab_size // here.tensor_group.size(),
                torch.device("cpu") if args.use_cpu_initialization else _device(),
            )
        self._lessons = Lessons(
            identity=identity,
            spec=spec,
            objective=teacher_choice.objective(self._options),
            here=here,
            sequence_parallel=args.sequence_parallel,
        )
        self._first_iteration = args.iteration
        self._agreement = Agreement(
            self._group,
            teacher_choice.policy(self._options),
            ce_only_used=self._open_ledger(),
            report=_say if here.is_reporter else None,
        )
        if dist.get_rank() == 0:
            print(f"learns from {identity.name}, {identity.fingerprint}", flush=True)
            if args.save is not None:
                start.remember_teacher(Path(args.save), identity.fingerprint)

    def _open_backend(self) -> TeacherBackend:
        student = f"rank-{dist.get_rank()}"
        return open_backend(
            teacher_choice.teacher_options(
                self._args, self._options, fingerprint=self._former_teacher, student=student
            )
        )

    def _same_identity(self) -> TeacherIdentity:
        """Tell all ranks who the teacher is.

        Raises:
            TeacherError: the ranks have reached different teachers.
        """
        mine = None if self._backend is None else self._backend.identity
        found: list[TeacherIdentity | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, self._group)
        identities = {one.fingerprint: one for one in found if one is not None}
        if len(identities) > 1:
            raise TeacherError(
                f"the ranks have reached {len(identities)} teachers ({', '.join(identities)}); "
                "there must be one. Take the replicas of the others out of the pool."
            )
        return next(iter(identities.values()))

    def _refuse_small_buffer(self, identity: TeacherIdentity) -> None:
        """Refuse a buffer that cannot hold a step, which would never begin."""
        spec = teacher_choice.target_spec(self._args, self._options)
        rows = get_num_microbatches() * self._args.micro_batch_size * self._args.seq_length
        needed = rows * bytes_per_token(spec, identity)
        if needed > self._options.buffer_gb * 1e9:
            raise ConfigError(
                f"the targets of one step have {needed / 1e9:.2f} GB in each process that asks, "
                f"and --kd-buffer-gb is {self._options.buffer_gb}; a step begins when it has all "
                "of them. Give more memory, or a smaller --kd-form."
            )

    def _open_ledger(self) -> int:
        """Open the ledger where it is written; give the steps without a teacher so far."""
        args, here = self._args, self._here
        if here.is_reporter and args.save is not None:
            self._ledger = Ledger(Path(args.save), last_iteration=args.iteration)
        used = [0 if self._ledger is None else self._ledger.num_ce_only]
        dist.broadcast_object_list(used, src=dist.get_world_size() - 1, group=self._group)
        return used[0]

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Any]:
        """Wrap the loader of training samples, where this process asks."""
        if self._backend is None:
            return batches
        self._lookahead = Lookahead(batches, self._requests, self._backend, self._options.lookahead)
        return self._lookahead

    def _requests(self, batch: Batch) -> Sequence[TargetRequest]:
        tokens_BS = batch["tokens"].cpu().numpy()
        bounds = None
        if batch.get("cu_seqlens") is not None:
            # Behind the last end each row is padded with it.
            rows = batch["cu_seqlens"].cpu().numpy()
            bounds = [row[: row.searchsorted(tokens_BS.shape[1]) + 1] for row in rows]
        assert self._lessons is not None, "the teacher is open before a loader is read"
        return row_requests(tokens_BS, bounds, self._lessons.spec)

    # Around each step.

    def install(self) -> None:
        """Take the place of the engine's `train_step`, and call it in the middle."""
        engine_step = megatron.training.training.train_step
        signature = inspect.signature(engine_step)

        def step(*arguments: Any, **keywords: Any) -> Any:
            iteration = signature.bind(*arguments, **keywords).arguments["iteration"]
            code = self._begin(iteration)
            if code is not None:
                # As the engine's step answers when the run is to save and end.
                saves = self._args.save is not None and iteration > self._first_iteration
                return {}, True, saves, True, code, None, None, 0
            answer = engine_step(*arguments, **keywords)
            self._end(iteration + 1)
            return answer

        megatron.training.training.train_step = step

    def _begin(self, iteration: int) -> int | None:
        """Agree on the branch of a step; give the exit code of a run that cannot go on."""
        began = time.monotonic()
        self._wait_s = 0.0
        self._tokens, self._targets = Digest(), Digest()
        self._seen.clear()
        try:
            self._branch = self._agreement.decide(self._is_ready)
        except Mlr1Error as error:
            return self._give_up(error, iteration)
        self._wait_s += time.monotonic() - began
        return None

    def _is_ready(self) -> bool:
        if self._lookahead is None:
            return True
        try:
            return self._lookahead.is_ready(get_num_microbatches())
        except Mlr1Error as error:
            self._mistake = error
            raise

    def _give_up(self, error: Mlr1Error, iteration: int) -> int:
        """Say once why no rank goes on."""
        self._has_given_up = True
        own = self._mistake
        mine = None if own is None else (str(own), own.exit_code)
        found: list[tuple[str, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, self._group)
        # Where no rank has an error of its own, all have waited too long.
        reason, code = next(filter(None, found), (str(error), error.exit_code))
        if dist.get_rank() == 0:
            saves = self._args.save is not None and iteration > self._first_iteration
            goes_on = "the same command goes on from there."
            note = f" The run is saved at step {iteration}; {goes_on}" if saves else ""
            print(f"error: {reason}{note}", file=sys.stderr, flush=True)
        return code

    def lesson(
        self, ahead: Ahead[Batch] | None, rows_BS: Tensor | None, here: Place
    ) -> Lesson | None:
        """Give the teacher's part in a micro-batch; None where the step goes on without.

        Args:
            ahead: what the lookahead gave; None in a process that asks nobody.
            rows_BS: which tokens of the micro-batch this process has, counted through it.
            here: where this process stands.
        """
        assert self._lessons is not None, "the teacher is open before the first step"
        assert rows_BS is not None, "the last stage has labels"
        targets = None
        if ahead is not None:
            assert self._lookahead is not None, "who has looked ahead has a lookahead"
            if self._branch is Branch.KD:
                began = time.monotonic()
                targets = self._lookahead.targets(ahead, self._options.hold_limit_s)
                self._wait_s += time.monotonic() - began
            self._note(ahead, targets)
        if self._branch is Branch.CE_ONLY:
            return None
        alpha = self._alpha.at(self._args.consumed_train_samples)
        return self._lessons.make(targets, rows_BS, alpha)

    def _note(self, ahead: Ahead[Batch], targets: Any) -> None:
        """Add a micro-batch to the step's digests, once, however often the engine replays it."""
        if ahead.tickets in self._seen:
            return
        self._seen.add(ahead.tickets)
        self._tokens.add([ahead.batch["tokens"].cpu().numpy()])
        for one in targets or ():
            self._targets.add(one.arrays.values())

    def _end(self, iteration: int) -> None:
        """Gather what all ranks saw of a step, and write it down."""
        if self._lookahead is not None:
            self._lookahead.step_done()
        reports = self._gathered()
        asking = [report for report in reports if report.asks]
        counting = [report for report in asking if report.counts]
        figures = list(zip(*(report.figures for report in asking), strict=True))
        self.figures = {
            "kd wait ms": max(figures[0]),
            "kd alpha": 0.0
            if self._branch is Branch.CE_ONLY
            else self._alpha.at(self._args.consumed_train_samples),
            "kd branch": str(self._branch),
        }
        for name, values in zip(COUNTS, figures[1:], strict=True):
            self.figures[f"teacher {name.replace('_', ' ')}"] = (
                min(values) if name == "replicas" else sum(values)
            )
        if self._ledger is not None:
            self._ledger.add(
                Entry(
                    iteration=iteration,
                    tokens=combine([report.tokens for report in counting]),
                    targets=combine([report.targets for report in counting]),
                    branch=self._branch,
                )
            )

    def _gathered(self) -> list[_Report]:
        backend = self._backend
        statistics = {} if backend is None else backend.statistics()
        mine = _Report(
            asks=backend is not None,
            counts=dist.get_rank(self._here.context_group) == 0,
            tokens=self._tokens.value(),
            targets=self._targets.value(),
            figures=(1000 * self._wait_s, *(float(statistics.get(name, 0)) for name in COUNTS)),
        ).pack()
        packed = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(packed, mine, self._group)
        return [_Report.unpack(one) for one in packed]

    def close(self) -> None:
        """Let go of the teacher, and write to its store what is not there yet."""
        if self._ledger is not None:
            self._ledger.close()
        if self._backend is not None:
            # A run that gives up has said why; a full disk would fail here once more.
            with suppress(Mlr1Error) if self._has_given_up else nullcontext():
                self._backend.close()


def _say(text: str) -> None:
    print(text, flush=True)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
