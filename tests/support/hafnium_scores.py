"""Scores asked for at a gateway, without a pause, as a payments company would: every answer is counted, lost ones are kept.

Requests, and what the feature store knows of the customers in them, are spread like the reference sample of `make_bundle`.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from hafnium_contract.model_contract import ModelContract
from hafnium_testing import synthetic_rows, synthetic_views

LOST_KEPT_MAX = 20
CUSTOMERS = 2000
"""Enough that what the store holds is spread like the bundles' reference sample."""
MISSING = 0.02
"""Share of values that nobody knows, of those that may be missing."""


def score_requests(contract: ModelContract, count: int = 1500) -> list[dict[str, Any]]:
    """Bodies of /v1/score."""
    rng = random.Random(2)
    rows = synthetic_rows(contract, count, 5)
    for row in rows:
        del row["request_id"]
        number = rng.randrange(CUSTOMERS)
        row["entity"] = {key: f"{key}-{number}" for key in row["entity"]}
        for name, feature in contract.request_fields.items():
            if feature.missing != "reject" and rng.random() < MISSING:
                del row["features"][name]
    return rows


def customers(contract: ModelContract) -> dict[str, list[dict[str, Any]]]:
    """What the store holds of each of them, as make_feature_repo takes it."""
    rng = random.Random(1)
    made = synthetic_views(contract, 1, entities=CUSTOMERS)
    for view in contract.views:
        for row in made[view.name]:
            for f in contract.features_of(view.name):
                if f.missing != "reject" and rng.random() < MISSING:
                    row[f.source.field] = None  # type: ignore[union-attr]  # features_of gives those with a view
    return made


class ScoreLoad:
    """`with` asks until its end, at about `rate` a second. Each request is sent once: what is neither answered nor refused is lost."""

    def __init__(self, gateway: str, host: str, bodies: Sequence[Any], *, rate: float, connections: int = 3) -> None:
        self._address = urlsplit(gateway).netloc
        self._headers = {"Host": host, "Content-Type": "application/json"}
        self._bodies = [json.dumps(b).encode() for b in bodies]
        self._pause_s = connections / rate
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._by_version: Counter[str] = Counter()
        self._refused = 0
        self._lost: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(k,), daemon=True) for k in range(connections)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    @property
    def versions(self) -> Counter[str]:
        """Answers by the model version that gave them."""
        with self._lock:
            return Counter(self._by_version)

    @property
    def refused(self) -> int:
        """Answers of 4xx: a model that finds fault with what another one takes."""
        with self._lock:
            return self._refused

    @property
    def lost(self) -> list[str]:
        """What went wrong, with the seconds since the process began to ask."""
        with self._lock:
            return list(self._lost)

    def next(self, requests: int, wait_s: float = 120.0) -> Counter[str]:
        """What the next so many requests met."""
        before, end = self.versions, time.monotonic() + wait_s
        while (now := self.versions).total() - before.total() < requests:
            assert time.monotonic() < end, f"{now.total() - before.total()} of {requests} answers in {wait_s:g} s; lost: {self.lost[:5]}"
            time.sleep(0.1)
        return now - before

    def _run(self, k: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=20)
        began = time.monotonic()
        while not self._ended.is_set():
            asked, refused = time.monotonic(), False
            try:
                connection.request("POST", "/v1/score", self._bodies[k % len(self._bodies)], self._headers)
                answer = connection.getresponse()
                text = answer.read().decode(errors="replace")
                refused = 400 <= answer.status < 500
                version = json.loads(text)["model_version"] if answer.status == 200 else ""
                fault = "" if version else f"{answer.status} {text[:200]}"
            except (OSError, http.client.HTTPException, ValueError, KeyError) as e:
                connection.close()
                version, fault = "", repr(e)
            with self._lock:
                if refused:
                    self._refused += 1
                elif fault:
                    self._lost += [f"{time.monotonic() - began:.1f} s: {fault}"] if len(self._lost) < LOST_KEPT_MAX else [""]
                else:
                    self._by_version[version] += 1
            k += len(self._threads)
            self._ended.wait(max(0.0, self._pause_s - (time.monotonic() - asked)))
        connection.close()
