"""Who may ask now: a limit on requests in progress that follows how long they wait, and a token bucket for each client.

A fixed number can't hold a latency: 256 requests are 40 ms of work on one machine and 200 ms on a busy one. So the number shrinks
while rows stand in the queue for too long, and grows again when they don't. Pure but for counting: time is an argument. All limits are
of one process.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from hafnium_transformer.errors import OverloadedError, RateLimitedError
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.settings import Settings

_WINDOW_S = 60.0
_STANDING_S = 0.1
"""A queue that is long for less than this is a burst, which is answered; after this it is an overload. CoDel's interval (RFC 8289)."""
_SHRINK, _GROW = 0.75, 1.1
"""Steps of the limit, one in each such interval: quickly down, slowly up."""
_FORGET_S = 1.0
"""A queue that nothing left for so long is empty, and its limit of no meaning."""
IN_FLIGHT_MIN = 64
"""The limit never shrinks below it: when the predictor itself is slow, few requests in flight would only make small batches."""
_KEY_BYTES_MAX = 64
"""Longer keys are kept as their hash."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """Token buckets by client key: `rate_per_s` rows a second on average, `burst` at once. See RFC 2697's single rate."""

    def __init__(self, rate_per_s: float, burst: float, clients_max: int) -> None:
        self._rate = rate_per_s
        self._burst = burst
        self._clients_max = clients_max
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def wait_s(self, client: str, rows: int, now: float, already: int = 0) -> float:
        """0 when `rows` rows may be asked now, and takes them; else the seconds until they may be.

        More rows than `burst` are let through when the bucket is full, and leave a debt: a batch must be possible at all. `already`: of
        these rows, how many this request took before; they are put back first, or no bucket were full for whom that was asked in two steps.
        Who is refused then has paid them: what came between, reading a body, was work.
        """
        bucket = self._buckets.get(client)
        if bucket is None:
            if len(self._buckets) >= self._clients_max:
                self._buckets.popitem(last=False)  # who has been silent for longest: its bucket is fullest
            bucket = self._buckets[client] = _Bucket(self._burst, now)
        else:
            self._buckets.move_to_end(client)
            bucket.tokens = min(bucket.tokens + (now - bucket.at) * self._rate, self._burst)
            bucket.at = now
            bucket.tokens = min(bucket.tokens + already, self._burst)
        needed = min(float(rows), self._burst)
        if bucket.tokens + 1e-9 < needed:
            bucket.tokens -= already
            return (needed - bucket.tokens) / self._rate
        bucket.tokens -= rows
        return 0.0


class QueueLimit:
    """How many requests may be in progress, by how long the oldest row of each batch had waited when it left.

    See RFC 8289 (CoDel) for what a standing queue is, and TCP's congestion window for how the limit moves.
    """

    def __init__(self, in_flight_max: int, wait_max_s: float) -> None:
        self._max = float(in_flight_max)
        self._min = float(min(IN_FLIGHT_MIN, in_flight_max))
        self._wait_max_s = wait_max_s
        self._limit = self._max
        self._above_since: float | None = None
        self._changed = 0.0
        self._left = 0.0
        """When a batch left last."""

    @property
    def now(self) -> int:
        return int(self._limit)

    def left(self, waited_s: float, now: float) -> None:
        """A batch leaves the queue, and its oldest row had waited for so long."""
        if now - self._left > 2.0 * _STANDING_S:  # the queue was empty: nothing stood in it
            self._above_since = None
        self._left = now
        if waited_s > self._wait_max_s:
            if self._above_since is None:
                self._above_since = now
            elif now - self._above_since >= _STANDING_S and now - self._changed >= _STANDING_S:
                self._limit, self._changed = max(self._limit * _SHRINK, self._min), now
            return
        self._above_since = None
        if self._limit < self._max and waited_s < self._wait_max_s / 2.0 and now - self._changed >= _STANDING_S:
            self._limit, self._changed = min(self._limit * _GROW, self._max), now


    def forget(self, now: float) -> None:
        """No batch has left for long: whatever shrank the limit is over."""
        if now - self._left > _FORGET_S:
            self._limit, self._above_since = self._max, None


class QueryVolume:
    """How many rows each client asked for in the last minute. Somebody who copies a model by asking it shows here."""

    def __init__(self, clients_max: int) -> None:
        self._clients_max = clients_max
        self._rows: dict[str, int] = {}
        self._ends = 0.0
        self.clients = 0
        """Clients in the window that ended last."""
        self.busiest_rows = 0
        """Rows of the busiest of them."""

    def asked(self, client: str, rows: int, now: float) -> bool:
        """Counts. True when a window has ended and the two figures are new."""
        ended = now >= self._ends
        if ended:
            self.clients, self.busiest_rows = len(self._rows), max(self._rows.values(), default=0)
            self._rows.clear()
            self._ends = now + _WINDOW_S
        if client in self._rows or len(self._rows) < self._clients_max:
            self._rows[client] = self._rows.get(client, 0) + rows
        return ended


def overloaded() -> OverloadedError:
    """What every request too many is told."""
    return OverloadedError("as many requests are in progress as can be answered in time; try again")


class Admission:
    """Both limits, as the settings have them."""

    def __init__(self, settings: Settings, metrics: TransformerMetrics) -> None:
        self._metrics = metrics
        self.limit = QueueLimit(settings.in_flight_max, settings.queue_ms_max / 1000.0)
        self._header = settings.client_header.lower().encode()
        self._limiter = None if settings.rate_limit_per_s == 0.0 else RateLimiter(
            settings.rate_limit_per_s, settings.rate_limit_burst or settings.rate_limit_per_s, settings.clients_max
        )
        self._volume = QueryVolume(settings.clients_max)
        self.in_flight = 0

    def client(self, headers: Mapping[bytes, bytes], peer: str) -> str:
        """The client's key: its header, or else the address that it comes from."""
        given = headers.get(self._header)
        if given is None:
            return peer
        return given.decode("latin-1") if len(given) <= _KEY_BYTES_MAX else hashlib.blake2b(given, digest_size=32).hexdigest()

    @property
    def full(self) -> bool:
        """The next request is one too many."""
        if self.in_flight < self.limit.now:
            return False
        self.limit.forget(time.monotonic())
        return self.in_flight >= self.limit.now

    def enter(self) -> None:
        """A request comes. Raises OverloadedError; otherwise `leave` must follow."""
        if self.full:
            raise overloaded()
        self.in_flight += 1

    def leave(self) -> None:
        """A request is answered."""
        self.in_flight -= 1

    def ask(self, client: str, rows: int, now: float, already: int = 0) -> None:
        """The request turned out to have so many rows, of which `already` were asked for. Raises RateLimitedError."""
        if self._volume.asked(client, rows - already, now):
            self._metrics.query_volume(self._volume.clients, self._volume.busiest_rows)
        if self._limiter is not None:
            wait_s = self._limiter.wait_s(client, rows, now, already)
            if wait_s > 0.0:
                raise RateLimitedError(f"too many rows asked for; try again in {wait_s:.1f} s", wait_s)
