"""Evidence as the API server has it now, understood once: a finding never changes, so its uid and resourceVersion say that it is known.

Which findings there are is listed anew at every turn; a cache never says that one is there which isn't. Pages are let go as soon as they
are looked at, and of findings that no rollout of the turn looks at, only what retention needs to know is kept: a cluster with a hundred
thousand of them must not end the process that would remove them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from hafnium_contract.durations import parse_duration
from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.evidence_retention import Asked, Retention, Stored
from hafnium_rollout.gate_spec import DriftEvidence
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import KubernetesError, Unreadable
from hafnium_rollout.kubernetes.kinds import MODEL_EVIDENCE, Json
from hafnium_rollout.kubernetes.objects_seen import dig, finding_seen, meta_of, rows, stored_at, time_of
from hafnium_rollout.observation import EvidenceUnread

LISTED_MAX = 100_000
"""Findings of which anything is known, at 1 kB each. Beyond it the list is refused, and what was seen of it is still removed from."""
HELD_MAX = 20_000
"""Findings that rollouts look at, at 12 kB each with thirty values (measured): what the operator's pod (512Mi) has room for."""
_ENDED = ("Promoted", "RolledBack")
_MAX_AGE: timedelta = DriftEvidence().max_age

@dataclass(frozen=True, slots=True)
class Findings:
    """A namespace's."""

    by_model: Mapping[str, tuple[EvidenceSpec, ...]] = field(default_factory=dict[str, tuple[EvidenceSpec, ...]])
    """By the model's digest."""
    unread: tuple[EvidenceUnread, ...] = ()

    def about(self, models: Iterable[str]) -> tuple[EvidenceSpec, ...]:
        """Those about these models, in the same order each time."""
        return tuple(f for m in sorted(models) for f in self.by_model.get(m, ()))


@dataclass(slots=True)
class _Known:
    version: str
    stored: Stored
    seen: EvidenceSpec | EvidenceUnread | None
    """None: nobody looks at it now."""


class EvidenceCache:
    """For one thread."""

    def __init__(self, listed_max: int = LISTED_MAX, held_max: int = HELD_MAX) -> None:
        self._known: dict[str, _Known] = {}
        self._surplus: frozenset[str] = frozenset()
        self._listed_max, self._held_max = listed_max, held_max

    @property
    def found(self) -> tuple[Stored, ...]:
        """Everything that the last reads saw, also one that was refused in the middle."""
        return tuple(k.stored for k in self._known.values())

    def let_go(self, surplus: Sequence[Stored]) -> None:
        """Nobody needs these and no others: they aren't held any more, whatever becomes of the objects."""
        self._surplus = frozenset(s.uid for s in surplus)
        for uid in self._surplus & self._known.keys():
            self._known[uid].seen = None

    def read(self, client: KubernetesClient, namespace: str, retention: Retention | None = None) -> dict[str, Findings]:
        """What is there now that rollouts may rest on, by namespace. Raises KubernetesError; never gives a part of it. Without `retention`:
        everything."""
        there: dict[str, _Known] = {}
        held = 0
        try:
            for page in client.pages(MODEL_EVIDENCE, namespace, objects_max=self._listed_max):
                for item in page.items:
                    held += self._take(item, there, retention, room=held < self._held_max)
        except KubernetesError:
            self._known |= there  # what was understood stays so, and retention may go by it
            raise
        others = {u: k for u, k in self._known.items() if namespace and k.stored.namespace != namespace}
        self._known = there | others
        if held >= self._held_max:
            raise Unreadable(
                f"list modelevidences in {namespace or 'all namespaces'}: rollouts look at {self._held_max} findings or more, which is all "
                "that there is room for; are old ones removed (--evidence_kept, runbook HafniumEvidenceNotRemoved)?")
        read: dict[str, dict[str, list[EvidenceSpec]]] = {}
        unread: dict[str, list[EvidenceUnread]] = {}
        for known in there.values():
            where = known.stored.namespace
            if isinstance(known.seen, EvidenceSpec):
                read.setdefault(where, {}).setdefault(known.seen.model_digest, []).append(known.seen)
            elif known.seen is not None:
                unread.setdefault(where, []).append(known.seen)
        return {n: Findings({d: tuple(f) for d, f in read.get(n, {}).items()}, tuple(unread.get(n, ()))) for n in {*read, *unread}}

    def _take(self, item: Json, there: dict[str, _Known], retention: Retention | None, *, room: bool) -> bool:
        """Whether the finding is held."""
        meta = meta_of(item)
        uid = meta.uid or f"{meta.namespace}/{meta.name}"
        known = self._known.get(uid)
        if known is None or known.version != meta.resource_version:
            seen = finding_seen(item)
            known = _Known(meta.resource_version, stored(item, seen, uid), seen)
        # What was surplus at the last full turn isn't for who asks for more since.
        wanted = retention is None or (
            retention.looked_at(known.stored) and (uid not in self._surplus or retention.by_time(known.stored)))
        if not wanted or not room:
            known.seen = None
        elif known.seen is None:
            known.seen = finding_seen(item)
        there[uid] = known
        return wanted


def stored(item: Json, seen: EvidenceSpec | EvidenceUnread, uid: str) -> Stored:
    """What retention needs to know of it."""
    meta, at = meta_of(item), stored_at(item)
    namespace = sys.intern(meta.namespace)
    if isinstance(seen, EvidenceUnread):
        return Stored(namespace, meta.name, uid, seen.model_digest, seen.kind, "Error", None, None, None, at)
    return Stored(
        namespace, meta.name, uid, sys.intern(seen.model_digest), sys.intern(seen.kind), sys.intern(seen.verdict), seen.window_start,
        seen.window_end, seen.created_at, at)


def asked_of(item: Json) -> Asked | None:
    """What a ModelRollout needs of evidence; None when it can't be told. Also of one that this operator doesn't understand as a whole."""
    status = item.get("status") or {}
    digests = {dig(item, "spec", "model", "digest"), *(dig(status, m, "digest") for m in ("stable", "candidate", "takenBack"))}
    try:
        ages = [(str(dig(g, "evidence", "kind") or "drift"), _max_age(g)) for g in rows(item, "spec", "gates")
                if dig(g, "drift") is not None or dig(g, "evidence") is not None]
        under_way = bool(dig(status, "rollback")) or (bool(dig(status, "runId")) and dig(status, "phase") not in _ENDED)
        began = time_of(dig(status, "startedAt")) if under_way else None
    except ValueError:
        return None
    return Asked(frozenset(d for d in digests if isinstance(d, str) and d), tuple(ages), began)


def _max_age(gate: Json) -> timedelta:
    found = dig(gate, "drift", "maxAge") or dig(gate, "evidence", "maxAge")
    return _MAX_AGE if found is None else parse_duration(str(found))
