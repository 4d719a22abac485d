"""Score pairs on a cluster: the inference logs of both services, in a mounted folder or a bucket.

Where they are is one setting for all rollouts, with {namespace}, {rollout} and {service} filled in. Both services may write to one
place: rows say which arm they are of and which model made them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hafnium_rollout.errors import StateError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import LiveRoute
from hafnium_rollout.score_pairs import ScorePairs
from hafnium_rollout.status import RolloutStatus


class ScoreLog:
    """Waiting rows per rollout. Safe between threads as long as one rollout is looked at by one of them."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._pairs: dict[tuple[str, str], tuple[str, ScorePairs]] = {}
        self._kept: dict[tuple[str, str], tuple[float, ...]] = {}
        self._lock = threading.Lock()

    def read(
        self, rollout: ModelRollout, namespace: str, status: RolloutStatus, live: LiveRoute | None,
    ) -> tuple[tuple[float, ...], str, dict[str, Any] | None]:
        """(new differences, why there are none, cursor after them) while the candidate gets copies; else no cursor."""
        stable, candidate = status.stable, status.candidate
        key = (namespace, rollout.name)
        if stable is None or candidate is None or not any(g.kind == "scores" for g in rollout.spec.gates):
            return (), "", None
        if live is None or candidate.service not in live.mirrors:
            with self._lock:
                self._kept.pop(key, None)
            return (), "", None
        if not self._place:
            return (), "the operator doesn't know where the inference log is (--inference_log)", None
        with self._lock:
            run, pairs = self._pairs.get(key, ("", ScorePairs()))
            if run != status.run_id:
                pairs.forget()
                self._kept.pop(key, None)
            self._pairs[key] = (status.run_id, pairs)
            kept = self._kept.pop(key, ())
        known = status.cursor.get("log")
        cursor = cast("Mapping[str, Any]", known) if isinstance(known, dict) else {}
        try:
            differences, after = pairs.read(
                self._folder(namespace, rollout.name, stable.service), self._folder(namespace, rollout.name, candidate.service),
                candidate.digest, cursor)
        except StateError as e:
            return kept, str(e), dict(cursor)
        return (*kept, *differences), "", after

    def give_back(self, rollout: ModelRollout, namespace: str, differences: tuple[float, ...]) -> None:
        """These pairs met no look: they come again with the next one."""
        with self._lock:
            self._kept[(namespace, rollout.name)] = differences

    def _folder(self, namespace: str, rollout: str, service: str) -> Path:
        place = self._place.replace("{namespace}", namespace).replace("{rollout}", rollout).replace("{service}", service)
        if "://" in place:
            raise StateError(f"--inference_log: {place}: only folders can be read")
        return Path(place)
