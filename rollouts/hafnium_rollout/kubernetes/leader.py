"""Leader election on a coordination.k8s.io Lease, and the fence that keeps a former leader from writing.

The rules are client-go's: a lease is another's until its record has stood unchanged for its duration by *our own* clock, so clocks
of machines are never compared; each write of the record is a compare-and-swap by resourceVersion, so of two that try one wins.

A leader may write for `renew_deadline_s` after it *asked for* its last renewal, which is shorter than the lease lasts: it stops
before anybody else may start. The clock runs on while the machine is suspended or the process is stopped (CLOCK_BOOTTIME), so a
leader that wakes up knows at its next write that it slept. What is left is the moment between that check and the API server's
write; there the resourceVersion preconditions of the writes decide: whatever the new leader wrote since makes the old one's write
a Conflict.

To lead *again* is not to lead *still*: a turn that began before another process had the lease was decided on what that one has changed
since. So a turn names the term that it began in (`in_term`), and the fence wants that very term: the Lease and how often it changed hands.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, KubernetesError, LeaseLost
from hafnium_rollout.kubernetes.kinds import LEASE, Json

_IN_TERM: ContextVar[str | None] = ContextVar("hafnium_rollout_term", default=None)
"""Term that the turn of this thread began in; None outside of turns, where nothing was decided before."""


@contextmanager
def in_term(term: str) -> Generator[None]:
    """What is written in here was decided in that term, and is only written in it."""
    before = _IN_TERM.set(term)
    try:
        yield
    finally:
        _IN_TERM.reset(before)


def boot_clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """client-go's defaults. The gap between deadline and duration is what a write may need after it was allowed."""

    duration_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Record:
    """What the Lease says."""

    holder: str = ""
    duration_s: float = 0.0
    renewed: str = ""
    acquired: str = ""
    transitions: int = 0


def record_of(lease: Json) -> Record:
    """A Lease's spec, with zero for whatever it doesn't say."""
    spec = cast("dict[str, Any]", lease.get("spec") or {})
    return Record(
        str(spec.get("holderIdentity") or ""), float(spec.get("leaseDurationSeconds") or 0), str(spec.get("renewTime") or ""),
        str(spec.get("acquireTime") or ""), int(spec.get("leaseTransitions") or 0),
    )


def next_record(seen: Record | None, unchanged_s: float, identity: str, times: LeaseTimes, now: datetime) -> Record | None:
    """The record to write, or None while the lease is another's. `unchanged_s`: for how long `seen` has stood as it is. Pure."""
    stamp = now.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    if seen is None:
        return Record(identity, times.duration_s, stamp, stamp, 0)
    if seen.holder == identity:
        return Record(identity, times.duration_s, stamp, seen.acquired or stamp, seen.transitions)
    if seen.holder and unchanged_s < max(seen.duration_s, 1.0):
        return None
    return Record(identity, times.duration_s, stamp, stamp, seen.transitions + 1)


class Leader:
    """One process' part in the election. `run` in a thread of its own; `check` from any."""

    def __init__(
        self, client: KubernetesClient, namespace: str, name: str, identity: str, times: LeaseTimes = LeaseTimes(), *,
        clock: Callable[[], float] = boot_clock, now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client.hurried(times.renew_deadline_s / 2)
        self._namespace, self._name, self.identity, self._times = namespace, name, identity, times
        self._clock, self._now = clock, now
        self._lease: Json | None = None
        self._seen: Record | None = None
        self._since = 0.0
        self._until = -1.0
        """Writes are allowed before this moment of the clock."""
        self._term = ""
        self.problem = ""
        """Why the last step failed, for people."""

    @property
    def leading(self) -> bool:
        return self._clock() < self._until

    @property
    def holder(self) -> str:
        return self._seen.holder if self._seen is not None else ""

    @property
    def term(self) -> str:
        """Names the time for which this process has led without anybody else in between. Empty before it ever led."""
        return self._term

    def check(self) -> None:
        """The fence. Raises LeaseLost when this process may not write, or not what the turn of this thread decided."""
        if not self.leading:
            held = f"{self.holder} holds it" if self.holder and self.holder != self.identity else "it was not renewed in time"
            raise LeaseLost(f"Lease {self._namespace}/{self._name}: {held}; nothing is written")
        term = _IN_TERM.get()
        if term is not None and term != self._term:
            raise LeaseLost(f"Lease {self._namespace}/{self._name}: another process had it since this was decided; nothing is written")

    def step(self) -> bool:
        """One try to take or renew the lease. Returns whether this process leads now."""
        asked = self._clock()
        try:
            self._look(asked)
            wanted = next_record(self._seen, asked - self._since, self.identity, self._times, self._now())
            if wanted is None:
                self._until = -1.0
            else:
                self._write(wanted, asked)
            self.problem = ""
        except Conflict:
            self.problem = "another process wrote the lease in between"
        except KubernetesError as e:
            self.problem = str(e)
        except Exception as e:  # noqa: BLE001 - credentials that can't be read, for example: this thread must not end unseen
            self.problem = f"{type(e).__name__}: {e}"
        return self.leading

    def _look(self, asked: float) -> None:
        found = self._client.find(LEASE, self._namespace, self._name)
        record = record_of(found) if found is not None else None
        if record != self._seen:
            self._seen, self._since = record, asked
        self._lease = found

    def _write(self, wanted: Record, asked: float) -> None:
        spec = {"holderIdentity": wanted.holder, "leaseDurationSeconds": max(1, round(wanted.duration_s)),
                "renewTime": wanted.renewed, "acquireTime": wanted.acquired, "leaseTransitions": wanted.transitions}
        if self._lease is None:
            self._lease = self._client.create(LEASE, {"metadata": {"name": self._name, "namespace": self._namespace}, "spec": spec})
        else:
            meta = self._lease["metadata"]
            kept = {"name": self._name, "namespace": self._namespace, "resourceVersion": meta["resourceVersion"], "uid": meta["uid"]}
            self._lease = self._client.update(LEASE, {"metadata": kept, "spec": spec})
        self._seen, self._since = record_of(self._lease), asked
        # Before `_until`: who finds the new time allowed must find the new term, too.
        self._term = f"{self._lease['metadata'].get('uid', '')}/{self._seen.transitions}"
        self._until = asked + self._times.renew_deadline_s

    def release(self) -> None:
        """Gives the lease up at a clean end, so that nobody waits for it to run out."""
        held, self._until = self.leading, -1.0
        if not held or self._lease is None:
            return
        seen = record_of(self._lease)
        stamp = self._now().astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        meta = self._lease["metadata"]
        kept = {"name": self._name, "namespace": self._namespace, "resourceVersion": meta["resourceVersion"], "uid": meta["uid"]}
        spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": stamp, "acquireTime": stamp,
                "leaseTransitions": seen.transitions}
        try:
            self._client.update(LEASE, {"metadata": kept, "spec": spec})
        except KubernetesError as e:
            self.problem = str(e)  # it runs out by itself

    def run(self, stop: threading.Event, changed: Callable[[bool], None]) -> None:
        """Steps until `stop` is set, then gives the lease up. `changed` is told when leading begins and ends.

        Who slept through another's term was not leading in between, though each of its own steps says that it leads.
        """
        before = ""
        while not stop.is_set():
            term = self._term if self.step() else ""
            if term != before:
                try:
                    if before:
                        changed(False)
                    if term:
                        changed(True)
                    before = term
                except Exception as e:  # noqa: BLE001 - this thread must not end unseen; what was not heard is told again
                    self.problem = f"what follows a change of the leader failed: {type(e).__name__}: {e}"
            stop.wait(self._times.retry_s)
        self.release()
