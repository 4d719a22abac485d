"""Score pairs on a cluster: the inference logs of both services, in a mounted folder or a bucket.

Where they are is one setting for all rollouts, with {namespace}, {rollout} and {service} filled in. Both services may write to one
place: rows say which arm they are of and which model made them.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from hafnium_rollout.errors import StateError
from hafnium_rollout.kubernetes.log_mirror import LogMirror
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import LiveRoute
from hafnium_rollout.score_pairs import ScorePairs
from hafnium_rollout.status import RolloutStatus


class ScoreLog:
    """Waiting rows per rollout. Safe between threads as long as one rollout is looked at by one of them."""

    def __init__(self, place: str, scratch: Path | None = None) -> None:
        self._place = place
        self._scratch = scratch
        """Where files of a bucket are kept; a folder of the process' own without one."""
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._mirrors: dict[str, LogMirror] = {}
        self._pairs: dict[tuple[str, str], tuple[str, ScorePairs]] = {}
        self._kept: dict[tuple[str, str], tuple[float, ...]] = {}
        self._lock = threading.Lock()

    def read(
        self, rollout: ModelRollout, namespace: str, status: RolloutStatus, live: LiveRoute | None, now: datetime,
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
            folders = [self._folder(namespace, rollout.name, s, now, began_anew=not cursor) for s in (stable.service, candidate.service)]
            differences, after = pairs.read(folders[0], folders[1], candidate.digest, cursor)
        except StateError as e:
            return kept, str(e), dict(cursor)
        return (*kept, *differences), "", after

    def give_back(self, rollout: ModelRollout, namespace: str, differences: tuple[float, ...]) -> None:
        """These pairs met no look: they come again with the next one."""
        with self._lock:
            self._kept[(namespace, rollout.name)] = differences

    def _folder(self, namespace: str, rollout: str, service: str, now: datetime, *, began_anew: bool) -> Path:
        place = self._place.replace("{namespace}", namespace).replace("{rollout}", rollout).replace("{service}", service)
        if "://" not in place:
            return Path(place)
        with self._lock:
            if self._scratch is None:
                self._own = tempfile.TemporaryDirectory(prefix="hafnium-log-")
                self._scratch = Path(self._own.name)
            # Per rollout too: two of them may read one place, each from where it stands.
            key = f"{namespace}/{rollout}/{place}"
            if key not in self._mirrors:
                self._mirrors[key] = LogMirror(place, self._scratch / hashlib.sha256(key.encode()).hexdigest()[:16])
            mirror = self._mirrors[key]
        return mirror.refresh(now, began_anew=began_anew)
