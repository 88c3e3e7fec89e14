"""Which replica answers which request, and when a second one is asked: arithmetic, no sockets.

All times are seconds of one monotonic clock that the caller reads; nothing here sleeps or waits.
"""

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Final

SMOOTHING: Final = 0.2
"""Weight of the newest measurement in a running mean."""
REMEMBERED: Final = 256
"""Service times of which a replica's quantiles are taken."""
HEDGE_BURST: Final = 2.0
"""Second requests that may be sent before any share has been earned."""
TOGETHER_S: Final = 0.01
"""Deliveries so close are of one step, which takes the targets of all its micro-batches at once."""


class Load:
    """What one replica has to do for us, and how fast it does it."""

    def __init__(self) -> None:
        """Start without measurements."""
        self.outstanding_tokens = 0
        self.num_outstanding = 0
        self._token_s: float | None = None
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._last_answer = 0.0

    def sent(self, tokens: int) -> None:
        """Count a request that leaves for the replica."""
        self.outstanding_tokens += tokens
        self.num_outstanding += 1

    def gave_up(self, tokens: int) -> None:
        """Count a request that nobody expects an answer to any more."""
        self.outstanding_tokens -= tokens
        self.num_outstanding -= 1

    def answered(self, tokens: int, sent_at: float, now: float) -> None:
        """Count an answer. A replica works in order, so it began when it had sent the last one."""
        self.gave_up(tokens)
        working_s = max(now - max(sent_at, self._last_answer), 1e-6)
        self._last_answer = now
        self._seconds.append(now - sent_at)
        # The mean of times, not of rates: two answers that come at once are no sign of speed.
        token_s = working_s / tokens
        old = token_s if self._token_s is None else self._token_s
        self._token_s = old + SMOOTHING * (token_s - old)

    @property
    def tokens_per_s(self) -> float | None:
        """Give the running mean of the replica's speed; None before its first answer."""
        return None if self._token_s is None else 1 / self._token_s

    def seconds_for(self, tokens: int, unknown: float) -> float:
        """Expect how long so many further tokens take behind all that is outstanding.

        Args:
            tokens: of the request that is thought of.
            unknown: tokens/s to assume of a replica that has not answered yet.
        """
        return (self.outstanding_tokens + tokens) / (self.tokens_per_s or unknown)

    def quantile(self, share: float) -> float | None:
        """Give the service time, in seconds, that `share` of the last answers did not exceed."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def choose(loads: Sequence[Load], tokens: int, random: Random) -> int:
    """Take two replicas by chance and give the place of the one that would answer first.

    Two choices spread load nearly as well as looking at all, and do not send every client to the
    same idle replica at once (Mitzenmacher, "The Power of Two Choices", IEEE TPDS 12(10), 2001).

    Args:
        loads: of the replicas that may be asked; at least one.
        tokens: of the request.
        random: of this client.
    """
    if len(loads) == 1:
        return 0
    known = [load.tokens_per_s for load in loads if load.tokens_per_s is not None]
    unknown = sum(known) / len(known) if known else 1.0
    one, other = random.sample(range(len(loads)), 2)
    first = loads[one].seconds_for(tokens, unknown) <= loads[other].seconds_for(tokens, unknown)
    return one if first else other


class Pace:
    """How fast the training takes targets, so how long until a deadline."""

    def __init__(self) -> None:
        """Start without a measurement."""
        self._first: int | None = None
        """The first deadline of the last step."""
        self._last = 0
        self._since = 0.0
        self._step_s: float | None = None

    def took(self, deadline: int, now: float) -> None:
        """Count a delivery; deadlines are the order in which targets are needed."""
        if self._first is None:
            self._first, self._last, self._since = deadline, deadline, now
        elif deadline > self._last:
            if now - self._since >= TOGETHER_S:
                step_s = (now - self._since) / (deadline - self._first)
                old = step_s if self._step_s is None else self._step_s
                self._step_s = old + SMOOTHING * (step_s - old)
                self._first, self._since = deadline, now
            self._last = deadline

    def slack(self, deadline: int, now: float) -> float:
        """Give the seconds until `deadline`, infinite while the pace is not known.

        The training waits for a deadline that is next; its slack is what is left of its step.
        """
        if self._step_s is None:
            return float("inf")
        return (deadline - self._last) * self._step_s - (now - self._since)


class HedgeBudget:
    """Lets second requests be at most a share of all requests."""

    def __init__(self, share: float) -> None:
        """Allow `share` second requests for each first one (0.05: five in a hundred)."""
        self._share = share
        self._allowed = HEDGE_BURST if share > 0 else 0.0

    def earn(self) -> None:
        """Count a first request."""
        self._allowed = min(self._allowed + self._share, max(HEDGE_BURST, 100 * self._share))

    def spend(self) -> bool:
        """Take one second request out of the budget, where there is one."""
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


class Breaker:
    """When an address that failed may be tried again: at once, then later and later."""

    FIRST_S: Final = 0.1
    LONGEST_S: Final = 5.0

    def __init__(self) -> None:
        """Start closed: the address may be tried."""
        self._failures = 0
        self._until = 0.0

    def failed(self, now: float, random: Random) -> None:
        """Wait twice as long as last time, give or take a quarter so that clients spread out."""
        wait_s = min(self.FIRST_S * 2**self._failures, self.LONGEST_S)
        self._until = now + wait_s * random.uniform(0.75, 1.25)
        self._failures += 1

    def worked(self) -> None:
        """Forget all failures."""
        self._failures = 0
        self._until = 0.0

    def may_try(self, now: float) -> bool:
        """Say whether the address may be tried now."""
        return now >= self._until
