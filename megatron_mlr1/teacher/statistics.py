"""What a replica counts about itself, for STATS."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

WINDOW_S: Final = 60.0
REMEMBERED: Final = 1000


@dataclass(eq=False, slots=True)
class Counters:
    """Counts since the start, and the newest times."""

    started: float = field(default_factory=time.monotonic)
    requests: int = 0
    tokens: int = 0
    from_ring: int = 0
    joined: int = 0
    busy: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    bytes_sent: int = 0
    _computed: deque[tuple[float, int, float]] = field(default_factory=deque)
    """When a request was computed, its tokens, and the seconds that the computation took."""
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def computed(self, tokens: int, seconds: float) -> None:
        """Count one computation."""
        self.requests += 1
        self.tokens += tokens
        self._computed.append((time.monotonic(), tokens, seconds))

    def answered(self, seconds: float) -> None:
        """Count one answer, by the time from the request's arrival."""
        self._latencies_s.append(seconds)

    def tokens_per_s(self) -> float:
        """Tokens computed in the last minute, by the seconds of that minute."""
        now = time.monotonic()
        while self._computed and self._computed[0][0] < now - WINDOW_S:
            self._computed.popleft()
        window_s = min(max(now - self.started, 1e-3), WINDOW_S)
        return sum(tokens for _, tokens, _ in self._computed) / window_s

    def speed(self) -> float | None:
        """Tokens/s while computing, in the last minute; None before the first request."""
        busy_s = sum(seconds for _, _, seconds in self._computed)
        tokens = sum(tokens for _, tokens, _ in self._computed)
        return tokens / busy_s if busy_s else None

    def latency_ms(self, percent: float) -> float:
        """Percentile of the newest times from arrival to answer; 0 before the first."""
        if not self._latencies_s:
            return 0.0
        return float(np.percentile(self._latencies_s, percent)) * 1000
