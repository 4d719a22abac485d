"""When to stop asking somebody who does not answer, and how often to ask again: a circuit breaker and a retry budget.

Pure: time is an argument. Both are of one process; with many of them each finds out for itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Breaker:
    """Closed: all may ask. After `failures_max` failures in a row it is open: nobody may, for a while that doubles each time. Then
    one may try (half open): success closes it, failure opens it again.

    See M. Nygard, Release It!, "Circuit Breaker".
    """

    failures_max: int
    pause_first_s: float
    pause_max_s: float
    _failures: int = 0
    _pause_s: float = 0.0
    _open_until: float = 0.0
    _trying_until: float = 0.0

    def may_ask(self, now: float) -> bool:
        """Whether to ask now. In half open state only the first who asks may, until it has said how it went."""
        if self._failures < self.failures_max:
            return True
        if now < self._open_until or now < self._trying_until:
            return False
        self._trying_until = now + self.pause_max_s  # should it never say that it is done, the next may try after this
        return True

    def succeeded(self) -> None:
        """An answer came, whatever it says."""
        self._failures, self._pause_s, self._trying_until = 0, 0.0, 0.0

    def failed(self, now: float) -> None:
        """No answer came."""
        self._failures += 1
        self._trying_until = 0.0
        if self._failures >= self.failures_max:
            self._pause_s = min(max(2.0 * self._pause_s, self.pause_first_s), self.pause_max_s)
            self._open_until = now + self._pause_s

    def tried(self) -> None:
        """Who might try is done, whatever it found out. Who had too little time to find out anything keeps nobody else from trying."""
        self._trying_until = 0.0

    @property
    def is_open(self) -> bool:
        """Failures have opened it, and nothing has closed it since."""
        return self._failures >= self.failures_max

    def wait_s(self, now: float) -> float:
        """Seconds until somebody may try."""
        return max(self._open_until - now, 0.0)


@dataclass
class RetryBudget:
    """Retries are a share of the requests, so that a struggling server is not asked twice by everybody at once.

    Each request adds `share`, each retry takes 1; a few are always there (`spare`), also at the beginning.
    """

    share: float
    spare: float
    _tokens: float = -1.0

    def requested(self) -> None:
        """A first attempt."""
        self._tokens = min((self.spare if self._tokens < 0.0 else self._tokens) + self.share, self.spare)

    def take(self) -> bool:
        """Whether a retry may be made; if so, it is counted."""
        if self._tokens < 0.0:
            self._tokens = self.spare
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
