"""Plays requests back at a fixed rate, as traffic comes: it does not wait for answers before it sends the next.

After a stall it catches up slowly (CATCH_UP).

Every answer is noted in a journal at once (one line: id, status, model version, arm, attempts, latency in ms). So a replay that
is killed goes on where it stopped, sends again what was not answered, and its summary still counts everything.
Latency runs from the moment at which the request was due, so a stall shows in every request that it held up.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from array import array
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.whole_files import write_atomically
from hafnium_contract.wire import ARM_HEADER, REQUEST_ID_HEADER
from hafnium_local.score_client import DEADLINE_S, Answer, post, session

STOP_GRACE_S = 10.0
"""After a stop, requests in flight get this long; what is then without an answer is sent by the next run."""
SUMMARY_PERIOD_S = 1.0
LINE_BYTES_MAX = 1024 * 1024
CATCH_UP = 1.5
"""After a stall, what was held up is sent at this multiple of the rate. All at once it would be a load that no traffic makes."""


@dataclass(frozen=True)
class ReplaySummary:
    """Counts over the whole journal, earlier runs included, but `lost`, `unanswered`, `repeated` and lost ones' `attempts`: of this run."""

    answered: int
    """Requests with a final answer: ok + refused + failed."""
    ok: int
    refused: int
    """4xx."""
    failed: int
    """5xx that are answers: 500 and the like."""
    lost: int
    """No answer until the deadline."""
    unanswered: int
    """In flight when the replay was stopped."""
    repeated: int
    """Not sent, because their id came before in this run: the journal knows each id once."""
    attempts: int
    retries: int
    resumed: int
    """Answered by earlier runs of this journal."""
    by_version: dict[str, int]
    """Answers with 2xx by model version."""
    by_arm: dict[str, int]
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    seconds: float
    finished: bool
    """False in the copies that are written while it runs, and when it was stopped early."""
    last_error: str = ""

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class _Counts:
    ok: int = 0
    refused: int = 0
    failed: int = 0
    lost: int = 0
    unanswered: int = 0
    repeated: int = 0
    attempts: int = 0
    resumed: int = 0
    by_version: collections.Counter[str] = field(default_factory=collections.Counter[str])
    by_arm: collections.Counter[str] = field(default_factory=collections.Counter[str])
    latencies_ms: array[float] = field(default_factory=lambda: array("f"))
    last_error: str = ""

    def add(self, status: int, version: str, arm: str, attempts: int, latency_ms: float) -> None:
        self.attempts += attempts
        self.latencies_ms.append(latency_ms)
        if 200 <= status < 300:
            self.ok += 1
            self.by_version[version] += 1
            self.by_arm[arm] += 1
        elif status < 500:
            self.refused += 1
        else:
            self.failed += 1

    def summary(self, seconds: float, *, finished: bool) -> ReplaySummary:
        answered = self.ok + self.refused + self.failed
        shares = [50, 95, 99, 100]
        found: list[float | None] = [None] * len(shares)
        if self.latencies_ms:
            found = [round(float(x), 3) for x in np.percentile(np.asarray(self.latencies_ms), shares)]
        return ReplaySummary(
            answered=answered, ok=self.ok, refused=self.refused, failed=self.failed, lost=self.lost, unanswered=self.unanswered,
            repeated=self.repeated, attempts=self.attempts,
            retries=max(0, self.attempts - answered - self.lost - self.unanswered), resumed=self.resumed,
            by_version=dict(self.by_version), by_arm=dict(self.by_arm), p50_ms=found[0], p95_ms=found[1], p99_ms=found[2],
            max_ms=found[3], seconds=round(seconds, 3), finished=finished, last_error=self.last_error,
        )


class Journal:
    """Answered requests, one line each, written as they come. `done` holds their ids."""

    def __init__(self, path: Path, counts: _Counts) -> None:
        self.path = path
        self.done: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._read(counts)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as e:
            raise InputError(f"{path}: can't be used as a journal: {e.strerror}") from e

    def _read(self, counts: _Counts) -> None:
        if not self.path.exists():
            return
        if not self.path.is_file():
            raise InputError(f"{self.path}: can't be used as a journal: not a regular file")
        whole = 0
        with self.path.open("rb") as f:
            for number, line in enumerate(f, start=1):
                if not line.endswith(b"\n"):
                    break  # the run before was cut off in the middle of it
                whole += len(line)
                try:
                    request_id, status, version, arm, attempts, latency = line.decode().rstrip("\n").split("\t")
                    counts.add(int(status), version, arm, int(attempts), float(latency))
                except ValueError as e:
                    raise InputError(f"{self.path}:{number}: not a journal of a replay: {line[:80]!r}") from e
                self.done.add(request_id)
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)
        counts.resumed = len(self.done)

    def add(self, request_id: str, status: int, version: str, arm: str, attempts: int, latency_ms: float) -> None:
        """Appends one answer. Raises InputError when the disk is full: going on would forget what was answered."""
        line = f"{request_id}\t{status}\t{_plain(version)}\t{_plain(arm)}\t{attempts}\t{latency_ms:.3f}\n".encode()
        try:
            os.write(self._fd, line)
        except OSError as e:
            raise InputError(f"{self.path}: can't be written: {e.strerror}") from e
        self.done.add(request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)


def _plain(text: str) -> str:
    return " ".join(text.split())


def identified(requests: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(request id, request) with the id in the request: its own, or one from its place, which stays the same at the next run.

    What neither a header nor a line of the journal can carry (tabs, NUL, half a character) is a blank in it.
    """
    for number, request in enumerate(requests):
        own = request.get("request_id")
        text = "" if own is None else "".join(c if c.isprintable() else " " for c in str(own))
        request_id = _plain(text) or f"replay-{number:09d}"
        yield request_id, request if own == request_id else {**request, "request_id": request_id}


async def replay(
    requests: Iterable[dict[str, Any]], url: str, *, rate_per_s: float, workers: int, journal: Path, limit: int | None = None,
    duration_s: float | None = None, stop: threading.Event | Path | None = None, summary: Path | None = None,
    deadline_s: float = DEADLINE_S, seed: int = 0,
) -> ReplaySummary:
    """Sends score requests to `url` (the gateway's, or its `/v1/score`) at `rate_per_s`, at most `workers` at a time.

    Ends after all requests, `limit` requests sent by this run, `duration_s`, or when `stop` is set (an event) or exists (a file);
    requests in flight are finished then. `summary` is rewritten every second. Raises InputError for arguments, a journal that can't
    be used, and whatever `requests` raises, after requests in flight are finished.
    """
    if not 0 < rate_per_s <= 100_000 or not 1 <= workers <= 10_000:
        raise InputError(f"rate must be above 0 and workers from 1 to 10000, got rate {rate_per_s:g}, workers {workers}")
    counts = _Counts()
    with Journal(journal, counts) as book:
        player = _Player(counts, book, _score_url(url), stop, deadline_s, random.Random(seed), summary)  # noqa: S311 - jitter
        return await player.play(identified(requests), rate_per_s, workers, limit, duration_s)


def _score_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"url must begin with http:// or https://, got {url!r}")
    return url if url.rstrip("/").endswith("/v1/score") else url.rstrip("/") + "/v1/score"


class _Player:
    def __init__(
        self, counts: _Counts, book: Journal, url: str, stop: threading.Event | Path | None, deadline_s: float,
        jitter: random.Random, summary: Path | None,
    ) -> None:
        self._counts = counts
        self._book = book
        self._url = url
        self._stop = stop
        self._deadline_s = deadline_s
        self._jitter = jitter
        self._summary = summary
        self._started = time.monotonic()
        self._stopped_at: float | None = None
        self._written_at = 0.0
        self._error: BaseException | None = None

    async def play(
        self, requests: Iterator[tuple[str, dict[str, Any]]], rate: float, workers: int, limit: int | None, duration_s: float | None
    ) -> ReplaySummary:
        flying: set[asyncio.Task[None]] = set()
        sent = 0
        seen: set[str] = set()
        earliest = self._started
        whole = False
        async with session(workers) as client:
            try:
                for looked, (request_id, request) in enumerate(requests):
                    if looked % 1000 == 0:
                        await asyncio.sleep(0)  # a long part that was answered already must not deafen the loop
                    if request_id in seen:
                        self._counts.repeated += 1
                        continue
                    seen.add(request_id)
                    if request_id in self._book.done:
                        continue
                    due = self._started + sent / rate
                    if not await self._wait(max(due, earliest), flying, workers, duration_s) or sent == limit:
                        break
                    # a bucket of 20 ms, since a sleep is seldom shorter than one
                    earliest = max(earliest, time.monotonic() - 0.02) + 1 / (CATCH_UP * rate)
                    task = asyncio.create_task(self._one(client, request_id, request, due))
                    flying.add(task)
                    task.add_done_callback(flying.discard)
                    task.add_done_callback(self._check)
                    sent += 1
                else:
                    whole = True
            finally:
                while flying:
                    self._look()
                    await asyncio.wait(set(flying), timeout=0.1)
        if self._error is not None:
            raise self._error
        found = self._counts.summary(time.monotonic() - self._started, finished=whole)
        self._write(found)
        return found

    async def _wait(self, due: float, flying: set[asyncio.Task[None]], workers: int, duration_s: float | None) -> bool:
        """Until the request is due and there is room for it. False: no more requests shall be sent."""
        while True:
            self._look()
            now = time.monotonic()
            if self._stopped_at is not None or self._error is not None:
                return False
            if duration_s is not None and now - self._started >= duration_s:
                return False
            if len(flying) >= workers:
                await asyncio.wait(set(flying), timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            elif now < due:
                await asyncio.sleep(min(0.1, due - now))
            else:
                return True

    async def _one(self, client: Any, request_id: str, request: dict[str, Any], due: float) -> None:
        answer = await post(
            client, self._url, request, {REQUEST_ID_HEADER: request_id}, deadline_s=self._deadline_s, jitter=self._jitter,
            give_up=self._given_up,
        )
        if answer.status == 0:
            self._counts.attempts += answer.attempts
            self._counts.last_error = answer.message
            if self._given_up():
                self._counts.unanswered += 1
            else:
                self._counts.lost += 1
            return
        latency_ms = (time.monotonic() - due) * 1000
        version, arm = _version(answer), answer.headers.get(ARM_HEADER, "")
        if answer.status >= 400:
            self._counts.last_error = f"status {answer.status}: {json.dumps(answer.body)[:300]}"
        try:
            self._book.add(request_id, answer.status, version, arm, answer.attempts, latency_ms)
        except HafniumError as e:
            self._error = self._error or e
        self._counts.add(answer.status, version, arm, answer.attempts, latency_ms)

    def _check(self, task: asyncio.Task[None]) -> None:
        """What a task died of ends the replay: a request that is in no count must not pass for one that was answered."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error

    def _given_up(self) -> bool:
        return self._stopped_at is not None and time.monotonic() - self._stopped_at > STOP_GRACE_S

    def _look(self) -> None:
        """Notices a stop, and writes the summary when it is time."""
        now = time.monotonic()
        stop = self._stop
        if self._stopped_at is None and stop is not None and (stop.exists() if isinstance(stop, Path) else stop.is_set()):
            self._stopped_at = now
        if self._summary is not None and now - self._written_at >= SUMMARY_PERIOD_S:
            self._written_at = now
            self._write(self._counts.summary(now - self._started, finished=False))

    def _write(self, found: ReplaySummary) -> None:
        if self._summary is None:
            return
        try:
            write_atomically(self._summary, json.dumps(found.as_json(), indent=1))
        except OSError as e:
            self._error = self._error or InputError(f"{self._summary}: can't be written: {e.strerror}")


def _version(answer: Answer) -> str:
    body: Any = answer.body
    return str(cast(dict[str, Any], body).get("model_version", "")) if isinstance(body, dict) else ""


def read_requests(file: Path) -> Iterator[dict[str, Any]]:
    """Requests of a JSONL file, one at a time. Raises InputError that names the line."""
    try:
        with file.open("rb") as f:
            for number, line in enumerate(f, start=1):
                if len(line) > LINE_BYTES_MAX:
                    raise InputError(f"{file}:{number}: longer than {LINE_BYTES_MAX} bytes")
                if not line.strip():
                    continue
                try:
                    data: Any = json.loads(line)
                except ValueError as e:
                    raise InputError(f"{file}:{number}: not JSON: {e}") from e
                if not isinstance(data, dict):
                    raise InputError(f"{file}:{number}: expected a score request (an object), got {type(data).__name__}")
                yield data
    except OSError as e:
        raise InputError(f"{file}: can't be read: {e.strerror}") from e


def again_and_again(file: Path) -> Iterator[dict[str, Any]]:
    """Requests of a JSONL file without an end: from the second time on their ids say which time it is."""
    number = 0
    for lap in itertools.count():
        for request_id, request in identified(read_requests(file)):
            number += 1
            yield request if lap == 0 else {**request, "request_id": f"{request_id}-lap{lap}"}
        if number == 0:
            raise InputError(f"{file}: holds no request")


@contextlib.contextmanager
def stop_event() -> Generator[threading.Event]:
    """An event that SIGTERM and SIGINT set, until the end of `with`. In the main thread only."""
    event = threading.Event()
    before = {n: signal.signal(n, lambda _number, _frame: event.set()) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Command line; SIGTERM and SIGINT finish what is in flight and write the summary."""
    parser = argparse.ArgumentParser(prog="python -m hafnium_local.replay", description="Sends score requests at a fixed rate.")
    parser.add_argument("--requests", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--url", required=True, help="the gateway, http://HOST:PORT")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--journal", type=Path, required=True, help="file of what was answered; a second run goes on from it")
    parser.add_argument("--summary", type=Path, help="JSON file, rewritten every second")
    parser.add_argument("--workers", type=int, default=64, help="requests in flight at most")
    parser.add_argument("--again", action="store_true", help="begin anew at the end of the file, under other ids, until stopped")
    parser.add_argument("--limit", type=int, help="requests to send")
    parser.add_argument("--seconds", type=float, help="time to send for")
    parser.add_argument("--deadline-seconds", type=float, default=DEADLINE_S, help="after which a request counts as lost")
    parser.add_argument("--stop-file", type=Path, help="stop when this file exists")
    args = parser.parse_args(argv)
    requests = again_and_again(args.requests) if args.again else read_requests(args.requests)
    try:
        with stop_event() as event:
            stop = _Either(event, args.stop_file) if args.stop_file is not None else event
            found = asyncio.run(replay(
                requests, args.url, rate_per_s=args.rate, workers=args.workers, journal=args.journal, limit=args.limit,
                duration_s=args.seconds, stop=stop, summary=args.summary, deadline_s=args.deadline_seconds,
            ))
    except HafniumError as e:
        sys.stderr.write(f"error: {e}\n")
        return e.exit_status
    sys.stdout.write(json.dumps(found.as_json()) + "\n")
    return 0


class _Either(threading.Event):
    """An event that is also set when a file exists."""

    def __init__(self, event: threading.Event, file: Path) -> None:
        super().__init__()
        self._event, self._file = event, file

    def is_set(self) -> bool:
        return self._event.is_set() or self._file.exists()


if __name__ == "__main__":
    sys.exit(main())
