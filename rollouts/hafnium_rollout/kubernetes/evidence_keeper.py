"""Removes the ModelEvidence that nothing needs any more (evidence_retention.py says which), and writes down what it removes before that.

After a turn, on a thread of its own, some at a time: neither a slow API server nor a volume that hangs costs a turn anything, and while one
of them does, nothing is removed. Each finding is read once more, recorded as it is, and deleted only if it is still that very object. With
a data folder the record is `evidence/<namespace>/` in it, whole findings in numbered JSON-lines files as those of the rollouts' record;
without one it is the log's line alone (event EvidenceRemoved), which has everything but the single numbers.

The lease is asked before each write, for the term in which the turn was. Of a namespace in which a ModelRollout can't be understood nothing
is removed: nobody knows which findings it asks for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, cast

from hafnium_contract.errors import HafniumError
from hafnium_rollout.errors import NotLeading
from hafnium_rollout.evidence_retention import Asked, Retention, Stored
from hafnium_rollout.kubernetes.client import KubernetesClient, Limits
from hafnium_rollout.kubernetes.errors import Conflict, NotFound
from hafnium_rollout.kubernetes.evidence_cache import EvidenceCache, asked_of
from hafnium_rollout.kubernetes.kinds import MODEL_EVIDENCE, Json
from hafnium_rollout.kubernetes.metrics import Metrics
from hafnium_rollout.kubernetes.objects_seen import dig, meta_of
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.newest_only import NewestOnly
from hafnium_rollout.record import RecordFiles, RecordLimits
from hafnium_rollout.record_lines import Lines

Log = Callable[[dict[str, Any]], None]
AT_ONCE = 10
"""Findings that are written down together: one wait for the disk, and no more than 10 MB of the largest that there are."""
RECORD_LIMITS = RecordLimits(total_bytes_max=256 * 1024 * 1024)
"""Of one namespace. A finding with thirty values is 0.6 kB packed: 400,000 of them, five months of a hundred rollouts' hourly jobs. Beyond
it the oldest file goes; whoever has to keep them longer copies finished files away."""
_CALLS = Limits(call_deadline_s=5.0, read_timeout_s=5.0, attempts_max=1)
"""No second attempt: the retries that the API server is asked to bear are for what guards a candidate. The next look tries again."""


class EvidenceKeeper:
    """`asked`, `also_asked` and `tidy` from the thread of the turns."""

    def __init__(self, client: KubernetesClient, settings: Settings, log: Log, metrics: Metrics, now: Callable[[], datetime]) -> None:
        """`client` is fenced: it writes only while this process leads."""
        self.cache = EvidenceCache()
        self._client, self._log, self._metrics, self._now = client.limited(_CALLS), log, metrics, now
        self._kept, self._removals_max = settings.evidence_kept, settings.evidence_removals_max
        self._folder = settings.data_folder / "evidence" if settings.data_folder is not None else None
        self._asked: dict[str, dict[str, Asked | None]] = {}
        """By namespace and ModelRollout; None: can't be understood."""
        self._told: set[str] = set()
        """Findings that were written down and couldn't be removed then."""
        self._said: dict[str, str] = {}
        """Each complaint is made once."""
        self._worker = NewestOnly[str]("evidence", self._failed)

    # --- life -----------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop()

    def lead(self) -> None:
        """A new term: what was found surplus in another one isn't removed by that."""
        self._worker.forget()

    # --- the turn's thread ----------------------------------------------------------------------------------------------------

    def asked(self, rollouts: Iterable[Json]) -> Retention:
        """What all ModelRollouts need now."""
        self._asked = {}
        for item in rollouts:
            meta = meta_of(item)
            self._asked.setdefault(meta.namespace, {})[meta.name] = asked_of(item)
        return self._retention()

    def also_asked(self, namespace: str, rollouts: Iterable[Json]) -> Retention:
        """What those of one namespace need, with these as they are now."""
        mine = self._asked.setdefault(namespace, {})
        mine |= {meta_of(item).name: asked_of(item) for item in rollouts}
        return self._retention()

    def _retention(self) -> Retention:
        asked = {n: [a for a in mine.values() if a is not None] for n, mine in self._asked.items()}
        return Retention(asked, self._now(), self._kept)

    def tidy(self, retention: Retention) -> None:
        """Has removed, later and elsewhere, what the last look found and nobody needs."""
        there = self.cache.found
        surplus = retention.surplus(there)
        unclear = {n: name for n, mine in self._asked.items() for name, asked in mine.items() if asked is None}
        going = [s for s in surplus if s.namespace not in unclear]
        self.cache.let_go(going)
        self._metrics.evidence(Counter(s.namespace for s in there), Counter(s.namespace for s in surplus))
        held_up = next((s.namespace for s in surplus if s.namespace in unclear), "")
        self._complain("unclear", (
            f"nothing is removed in {held_up}: ModelRollout {unclear[held_up]} can't be understood, so it isn't known which evidence it "
            "asks for") if held_up else "")
        batch = going[:self._removals_max]
        if batch and self._worker.started:
            self._worker.put("", lambda: self.remove(batch))

    # --- the other thread -----------------------------------------------------------------------------------------------------

    def remove(self, surplus: Sequence[Stored]) -> None:
        """Writes down and deletes. Raises NotLeading; stops at the first other failure, which is counted and said once."""
        self._told &= {s.uid for s in surplus}
        try:
            for i in range(0, len(surplus), AT_ONCE):
                items = [item for s in surplus[i:i + AT_ONCE] if (item := self._read(s)) is not None]
                self._write_down([item for item in items if meta_of(item).uid not in self._told])
                for item in items:
                    self._delete(item)
        except NotLeading:
            raise
        except (HafniumError, OSError, ValueError) as e:
            self._metrics.evidence_not_removed(type(e).__name__)
            self._complain("removal", f"old evidence can't be removed: {e}")
        else:
            self._complain("removal", "")

    def _read(self, surplus: Stored) -> Json | None:
        """The object as it is now; None when it is another one, or gone, or going."""
        item = self._client.find(MODEL_EVIDENCE, surplus.namespace, surplus.name)
        if item is None:
            return None
        meta = meta_of(item)
        return item if meta.uid == surplus.uid and not meta.deleting else None

    def _write_down(self, items: Sequence[Json]) -> None:
        if not items:
            return
        self._client.ask_fence()
        now = self._now()
        by_namespace: dict[str, list[Json]] = {}
        for item in items:
            by_namespace.setdefault(meta_of(item).namespace, []).append(item)
        if self._folder is not None:
            for namespace, mine in by_namespace.items():
                text = "".join(json.dumps(recorded(item, now), ensure_ascii=False, separators=(",", ":")) + "\n" for item in mine)
                # Opened anew each time: another leader may have gone on to another file.
                RecordFiles(self._folder / namespace, RECORD_LIMITS, durable=True).append(Lines(text.encode(), begins=True))
        for item in items:
            self._log(told(item, now))
            self._told.add(meta_of(item).uid)

    def _delete(self, item: Json) -> None:
        meta = meta_of(item)
        try:
            self._client.delete(MODEL_EVIDENCE, meta.namespace, meta.name, uid=meta.uid, resource_version=meta.resource_version)
        except (NotFound, Conflict):
            return  # gone, or touched by somebody since: the next look says what it is now
        self._told.discard(meta.uid)
        self._metrics.evidence_removed(meta.namespace)

    def _failed(self, _: str, error: Exception) -> None:
        if not isinstance(error, NotLeading):  # else it is the next leader's thing
            self._metrics.evidence_not_removed(type(error).__name__)
            self._complain("removal", f"old evidence can't be removed: {type(error).__name__}: {error}")

    def _complain(self, about: str, message: str) -> None:
        """Empty: it is well again."""
        before, self._said[about] = self._said.get(about, ""), message
        if message and message != before:
            self._log({"time": self._now(), "level": "error", "event": "EvidenceNotRemoved", "message": message})


def recorded(item: Json, now: datetime) -> Json:
    """A removed finding as its line in the record. Pure."""
    meta = cast("Json", item.get("metadata") or {})
    kept = {k: meta[k] for k in ("namespace", "name", "uid", "creationTimestamp", "labels", "annotations") if k in meta}
    return {"kind": "removed", "time": now.isoformat(), "metadata": kept, "spec": item.get("spec")}


def told(item: Json, now: datetime) -> Json:
    """A removed finding as its line in the log: all but its values. Pure."""
    meta = meta_of(item)
    said = {k: dig(item, "spec", k) for k in ("kind", "verdict", "modelDigest", "windowStart", "windowEnd", "samples", "bothArms", "job",
                                              "report", "createdAt")}
    return {"time": now, "level": "info", "event": "EvidenceRemoved", "message": str(dig(item, "spec", "message") or ""),
            "evidence": f"{meta.namespace}/{meta.name}", "uid": meta.uid, **{k: v for k, v in said.items() if v not in (None, "")}}
