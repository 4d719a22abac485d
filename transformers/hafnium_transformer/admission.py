"""Who may ask now: a limit on requests in progress, and a token bucket for each client.

Pure but for counting: time is an argument. Both limits are of one process.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from hafnium_transformer.errors import OverloadedError, RateLimitedError
from hafnium_transformer.metrics import TransformerMetrics
from hafnium_transformer.settings import Settings

_WINDOW_S = 60.0
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

    def wait_s(self, client: str, rows: int, now: float) -> float:
        """0 when `rows` rows may be asked now, and takes them; else the seconds until they may be.

        More rows than `burst` are let through when the bucket is full, and leave a debt: a batch must be possible at all.
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
        needed = min(float(rows), self._burst)
        if bucket.tokens + 1e-9 < needed:
            return (needed - bucket.tokens) / self._rate
        bucket.tokens -= rows
        return 0.0


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


class Admission:
    """Both limits, as the settings have them."""

    def __init__(self, settings: Settings, metrics: TransformerMetrics) -> None:
        self._metrics = metrics
        self._in_flight_max = settings.in_flight_max
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

    def enter(self) -> None:
        """A request comes. Raises OverloadedError; otherwise `leave` must follow."""
        if self.in_flight >= self._in_flight_max:
            raise OverloadedError(f"{self._in_flight_max} requests are in progress; try again")
        self.in_flight += 1

    def leave(self) -> None:
        """A request is answered."""
        self.in_flight -= 1

    def ask(self, client: str, rows: int, now: float) -> None:
        """The request turned out to have so many rows. Raises RateLimitedError."""
        if self._volume.asked(client, rows, now):
            self._metrics.query_volume(self._volume.clients, self._volume.busiest_rows)
        if self._limiter is not None:
            wait_s = self._limiter.wait_s(client, rows, now)
            if wait_s > 0.0:
                raise RateLimitedError(f"too many rows asked for; try again in {wait_s:.1f} s", wait_s)
