"""What the client does with open work: ask, ask again, compare, deliver.

A `Dispatcher` belongs to the client's thread, which calls `turn` whenever something may have
changed. Its promises: the most urgent work is asked for first; the targets of a ticket are
delivered once, whatever comes twice; a replica's death puts its work back into line at its old
place; what the replicas owe plus what is not yet fetched never exceeds the buffer.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from megatron_mlr1.errors import TeacherError
from megatron_mlr1.teacher import payloads, wire
from megatron_mlr1.teacher.audit import bits, odd_one_out
from megatron_mlr1.teacher.replicas import Flight, Replica, Replicas
from megatron_mlr1.teacher.scheduling import HedgeBudget, Pace, choose
from megatron_mlr1.teacher.spec import Targets
from megatron_mlr1.teacher.tickets import State, TicketTable, Work, most_urgent
from megatron_mlr1.teacher.wire import Code, Kind, Message

MAX_DEATHS: Final = 2
"""A request at which so many replicas died or failed is not given to another one."""
LOST_AFTER_S: Final = 3.0
"""Shortest time after which an answer of a living replica is given up."""
LOST_FACTOR: Final = 8.0
"""An answer is given up after so many times the replica's 99th percentile."""
FIRST_ANSWER_S: Final = 10.0
"""Stands for that percentile before the first answer, which may compile kernels."""
UNKNOWN_SLACK_MS: Final = 60_000
"""Told to replicas while the pace of the training is not known."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchOptions:
    """How carefully and how eagerly replicas are asked."""

    buffer_bytes: int = 2 * 2**30
    """Targets that may be owed or wait to be fetched. Eight micro-batches of 4 x 4,096 tokens of
    bf16 states of a teacher of width 4,096 have 1.07 GB."""
    in_flight: int = 2
    """Requests of this student at one replica: one computes while the other travels."""
    hedge_share: float = 0.05
    """Second requests for late answers, by all requests; 0 sends none."""


class Dispatcher:
    """Moves work from the table to the replicas and back."""

    def __init__(
        self,
        table: TicketTable,
        replicas: Replicas,
        options: DispatchOptions,
        numbers: Iterator[int],
        random: Random,
        keep: Callable[[Targets], Targets],
    ) -> None:
        """Take the books, the replicas, and what brings received targets to where they may stay."""
        self._table, self._replicas, self._options = table, replicas, options
        self._numbers, self._random, self._keep = numbers, random, keep
        self._queue: list[tuple[tuple[int, int], Work]] = []
        self._used = 0
        self._hedges = HedgeBudget(options.hedge_share)
        self.pace = Pace()
        self.counts: Counter[str] = Counter()
        self.peak_bytes = 0

    def add(self, work: Work) -> None:
        """Put work into line, at its place."""
        heapq.heappush(self._queue, (work.urgency, work))

    def served(self, work: Work, now: float) -> None:
        """Let go of work that nobody awaits any more."""
        self._give_back(work.num_bytes * len(work.answers))
        work.answers.clear()
        self.pace.took(work.deadline, now)
        self._abandon(work)

    def turn(self, now: float) -> None:
        """Bury the dead, ask for what is in line, and ask again for what is late."""
        for replica in self._replicas.take_dead(now):
            self._bury(replica)
        self._ask_all(now)
        self._ask_again(now)

    # Asking.

    def _ask_all(self, now: float) -> None:
        passed_over = []
        while self._queue:
            work = self._queue[0][1]
            if not self._is_open(work):
                heapq.heappop(self._queue)
                continue
            if not self._wants(work):
                heapq.heappop(self._queue)
                if not work.asked:  # the replica that was to audit it is gone
                    self._judge(work)
                continue
            free = self._free(now)
            if not free or not self._make_room(work):
                break
            heapq.heappop(self._queue)
            fit = self._fit(work, free)
            if fit:
                self._ask(self._pick(fit, work), work, now)
            if self._is_open(work) and self._wants(work):
                passed_over.append(work)
        for work in passed_over:
            self.add(work)

    def _is_open(self, work: Work) -> bool:
        return work.state is not State.DONE and self._table.find(work.key) is work

    def _wants(self, work: Work) -> bool:
        """Say whether open work needs one replica more than it has."""
        return len(work.asked) + len(work.answers) < self._wanted_answers(work)

    def _wanted_answers(self, work: Work) -> int:
        if not work.audited:
            return 1
        if len(work.answers) >= 2:
            return 3  # two differ
        return min(2, max(len(self._replicas.serving()), 1))

    def _free(self, now: float) -> list[Replica]:
        in_flight = self._options.in_flight
        return [one for one in self._replicas.serving() if one.is_free(in_flight, now)]

    def _pick(self, replicas: list[Replica], work: Work) -> Replica:
        loads = [one.load for one in replicas]
        return replicas[choose(loads, work.request.rows, self._random)]

    def _fit(self, work: Work, free: list[Replica]) -> list[Replica]:
        """Choose who may be asked: nobody twice, and none that died of it if there is another."""
        new = [one for one in free if one.name not in work.asked and one.name not in work.answers]
        return [one for one in new if one.name not in work.killed] or new

    def _ask(self, replica: Replica, work: Work, now: float) -> None:
        connection = replica.connection
        if work.request.rows > connection.max_tokens:
            self._finish(work, _too_long(work, replica))
            return
        slack_s = self.pace.slack(work.deadline, now)
        slack_ms = UNKNOWN_SLACK_MS if slack_s == float("inf") else int(max(slack_s, 0) * 1000)
        number = next(self._numbers)
        frames = payloads.submit_frames(work.request, slack_ms)
        connection.submit(number, work.key, frames, work.num_bytes)
        replica.flights[number] = Flight(work, now)
        replica.load.sent(work.request.rows)
        work.asked[replica.name] = now
        work.state = State.ASKED
        self._used += work.num_bytes
        self.peak_bytes = max(self.peak_bytes, self._used)
        self.counts["asked"] += 1
        self._hedges.earn()

    def _make_room(self, work: Work) -> bool:
        """Say whether the targets fit, taking back later ones that nobody has fetched if not."""
        if self._used + work.num_bytes <= self._options.buffer_bytes:
            return True
        for other in reversed(most_urgent(self._table.works())):
            if other.urgency <= work.urgency:
                return False
            if (other.asked or other.answers) and self._take_back(other):
                self.counts["taken_back"] += 1
                if self._used + work.num_bytes <= self._options.buffer_bytes:
                    return True
        return False

    def _take_back(self, work: Work) -> bool:
        """Put work back into line with nothing; False where its targets were just fetched."""
        if work.state is State.DONE and not self._table.reopen(work):
            return False
        self._abandon(work)
        self._give_back(work.num_bytes * len(work.answers))
        work.answers.clear()
        work.state = State.QUEUED
        self.add(work)
        return True

    def _ask_again(self, now: float) -> None:
        """Give up lost answers, and ask a second replica for late ones within the budget.

        Work that a replica may have died of is with one at a time.
        """
        for replica in list(self._replicas.living.values()):
            for number, flight in list(replica.flights.items()):
                work, age_s = flight.work, now - flight.sent_at
                usual_s = replica.load.quantile(0.99) or FIRST_ANSWER_S
                if age_s > max(LOST_AFTER_S, LOST_FACTOR * usual_s):
                    self.counts["lost"] += 1
                    replica.connection.cancel(number, work.key)
                    self._land(replica, number)
                    self.add(work)
                elif not (work.hedged or work.audited or work.killed) and age_s > usual_s:
                    self._hedge(work, now)

    def _hedge(self, work: Work, now: float) -> None:
        fit = self._fit(work, self._free(now))
        fit = [one for one in fit if one.load.tokens_per_s is not None]
        if not fit:
            return
        second = self._pick(fit, work)
        expected_s = second.load.seconds_for(work.request.rows, 1.0)
        if self.pace.slack(work.deadline, now) >= expected_s:
            return
        has_room = self._used + work.num_bytes <= self._options.buffer_bytes
        if has_room and self._hedges.spend():
            work.hedged = True
            self.counts["hedges"] += 1
            self._ask(second, work, now)

    # Answers.

    def received(self, replica: Replica, message: Message, now: float) -> None:
        """Take a message that concerns a request."""
        flight = replica.flights.get(message.request)
        if flight is None:
            # It was answered before, cancelled, or given up.
            self.counts["duplicates"] += message.kind is Kind.DATA
        elif message.kind is Kind.DATA:
            self._take_data(replica, message, flight, now)
        elif message.kind in (Kind.BUSY, Kind.GOAWAY):
            self.counts["busy"] += 1
            replica.busy_until = now + message.value / 1000
            self._land(replica, message.request)
            self.add(flight.work)
        elif message.kind is Kind.ERROR:
            self._take_error(replica, message, flight.work)

    def _take_data(self, replica: Replica, message: Message, flight: Flight, now: float) -> None:
        work, identity = flight.work, self._replicas.identity
        assert identity is not None, "only a replica that said who it is was asked"
        del replica.flights[message.request]
        replica.connection.settle(work.num_bytes)
        replica.load.answered(work.request.rows, flight.sent_at, now)
        del work.asked[replica.name]
        try:
            if (message.key, message.teacher) != (work.key, identity.short):
                raise TeacherError("an answer belongs to another request or another teacher.")
            targets = payloads.read_data(message, work.request.spec, identity, work.request.rows)
            targets.check(identity, work.request.rows)
        except TeacherError as error:
            self._give_back(work.num_bytes)
            self.eject(replica.name, f"a wrong answer: {error}")
            self.add(work)
            return
        self._replicas.answered(replica)
        work.answers[replica.name] = self._keep(targets)
        self._judge(work)

    def _judge(self, work: Work) -> None:
        """Deliver where enough replicas answered alike; eject who is alone with an answer."""
        answers = work.answers
        if len(answers) < self._wanted_answers(work) and len(answers) < 2:
            self.add(work)
            return
        odd = odd_one_out(answers)
        if odd is None and len(set(map(bits, answers.values()))) > 1:
            self._settle_dispute(work)
            return
        if work.audited:
            self.counts["audits" if len(answers) > 1 else "audits_alone"] += 1
        if odd is not None:
            self._give_back(work.num_bytes)
            del answers[odd]
            self.counts["audit_mismatches"] += 1
            self.eject(odd, "an audit: two others agree on other targets than it gave")
        self._give_back(work.num_bytes * (len(answers) - 1))
        name, targets = next(iter(answers.items()))
        work.answers = {name: targets}
        self._abandon(work)
        self._table.finish(work, targets, None)

    def eject(self, name: str, reason: str) -> None:
        """Ask a replica no more, and ask others for what it gave and nobody has fetched yet."""
        self._replicas.eject(name, reason)
        for work in self._table.works():
            if name not in work.answers:
                continue
            if work.state is not State.DONE:  # an audit: the other answers still count
                del work.answers[name]
                self._give_back(work.num_bytes)
                self.add(work)
                self.counts["disowned"] += 1
            elif self._take_back(work):
                self.counts["disowned"] += 1

    def _settle_dispute(self, work: Work) -> None:
        """Ask a third replica who is right, if there is one."""
        if self._replicas.num_possible > len(work.answers):
            self.add(work)
            return
        names = " and ".join(sorted(work.answers))
        error = TeacherError(
            f"the teacher replicas {names} give different targets for the same sequence, and there "
            "is no further one to say who is right. Look at both, stop the broken one, or serve "
            "three or more; then start the run again."
        )
        self._finish(work, error)
        self._table.fail(error)

    def _take_error(self, replica: Replica, message: Message, work: Work) -> None:
        try:
            code, text = wire.read_error(message)
        except wire.WireError as error:
            replica.connection.die(f"it sent what is no message: {error}")
            return
        if code in (Code.NO_HELLO, Code.MALFORMED, Code.WRONG_TEACHER):
            replica.connection.die(f"it refused a request: {text}")
            return
        self._land(replica, message.request)
        if code is Code.WRONG_REQUEST:
            self._finish(work, TeacherError(f"the teacher refuses a sequence: {text}"))
            return
        self.counts["failed"] += 1
        self._suspect(work, replica.name, text)

    # Endings.

    def _bury(self, replica: Replica) -> None:
        """Put back what a dead replica had; the oldest request may be what it died of."""
        suspects = list(replica.flights)[:1] if replica.name not in self._replicas.ejected else []
        for number in list(replica.flights):
            work = self._land(replica, number)
            self.counts["failovers"] += 1
            if number in suspects:
                self._suspect(work, replica.name, replica.connection.reason)
            else:
                self.add(work)
        if not self._replicas.serving():
            # All gone at once: the network or the pool, and no request is to blame.
            for work in self._table.works():
                work.killed.clear()

    def _suspect(self, work: Work, name: str, reason: str) -> None:
        work.killed.add(name)
        if len(work.killed) < MAX_DEATHS:
            self.add(work)
            return
        self.counts["quarantined"] += 1
        self._finish(
            work,
            TeacherError(
                f"the sequence {work.key.hex()} of {work.request.rows} tokens is not asked for "
                f"again: the replicas {' and '.join(sorted(work.killed))} died or failed at it "
                f"(the last one: {reason}). Look at their logs; a sequence that is too long for "
                "the device's memory wants a shorter --seq-length or a larger device."
            ),
        )

    def _finish(self, work: Work, error: TeacherError) -> None:
        if not self._is_open(work):
            return
        _log.error("%s", error)
        self._abandon(work)
        self._give_back(work.num_bytes * len(work.answers))
        work.answers.clear()
        self._table.finish(work, None, error)

    def _abandon(self, work: Work) -> None:
        """Cancel what replicas were asked for; one that has just died is buried soon."""
        living = self._replicas.living
        for replica in [living[name] for name in work.asked if name in living]:
            for number, flight in list(replica.flights.items()):
                if flight.work is work:
                    replica.connection.cancel(number, work.key)
                    self._land(replica, number)

    def _land(self, replica: Replica, number: int) -> Work:
        """End a flight without targets."""
        work = replica.flights.pop(number).work
        replica.load.gave_up(work.request.rows)
        replica.connection.settle(work.num_bytes)
        del work.asked[replica.name]
        self._give_back(work.num_bytes)
        return work

    def _give_back(self, num_bytes: int) -> None:
        self._used -= num_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of targets that are owed or wait to be fetched."""
        return self._used


def _too_long(work: Work, replica: Replica) -> TeacherError:
    return TeacherError(
        f"a sequence has {work.request.rows} tokens; the teacher replica {replica.name} takes "
        f"{replica.connection.max_tokens}. Choose a shorter --seq-length or another teacher."
    )
