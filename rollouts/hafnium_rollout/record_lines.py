"""The record's form: JSON lines that hold every turn of a rollout, so that it can be decided again. Pure; files are record.py's.

A record is a sequence of two kinds of line:

- `start`: schema version, the ModelRollout and the whole status before the next turn. One opens every file, and one comes whenever
  the status is not what the last turn left (a restart, a repaired file), so a replay always knows where it stands.
- `turn`: the time, what of the observation differs from the turn before, the ModelRollout when it changed, what was done, and a
  digest of the status after it.

Findings of jobs are written once and then named by number: they are the same at each look, and large. Only those about the models
of this rollout are kept, because `decide` looks at no others.

Turns that could not be written are a gap: the next one that can opens with a `start`, which says how many they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, cast

from pydantic import ValidationError

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.actions import Action, Decision
from hafnium_rollout.errors import RecordError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import Observation
from hafnium_rollout.observation_codec import decode, encode
from hafnium_rollout.status import RolloutStatus

SCHEMA = 1
_ENDED = ("Promoted", "RolledBack")
_DIGEST_POINTS = 16
"""More than one turn adds."""


@dataclass(frozen=True, slots=True)
class Start:
    """From here on turns follow from this status."""

    time: datetime
    version: str
    """Of the Hafnium that decided."""
    rollout: ModelRollout
    status: RolloutStatus
    lost: int = 0
    """Turns before it that were not written, as far as the writer knew."""


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """What one turn saw, and what it led to."""

    now: datetime
    rollout: ModelRollout
    seen: Observation
    actions: tuple[Mapping[str, Any], ...]
    after: str
    """`status_digest` of the status that was decided."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Lines that couldn't be read; the turns after them are left out until the next start."""

    where: str
    message: str


def status_digest(status: RolloutStatus) -> str:
    """Short sha256 of what a status says. An API server gives the cursor back with its keys in another order, and 1.0 as 1.

    Of the history only the newest points are in it: the others were in the digests of the turns before, and a long history would be
    nine tenths of the time.
    """
    parts = [status.model_dump_json(exclude={"cursor", "history"}), json.dumps(_canonical(status.cursor), sort_keys=True)]
    parts += [p.model_dump_json() for p in status.history[-_DIGEST_POINTS:]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _canonical(v) for k, v in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in cast("list[Any]", value)]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def relevant(rollout: ModelRollout, status: RolloutStatus, seen: Observation) -> Observation:
    """The observation without findings about models that this rollout has nothing to do with."""
    digests = {rollout.spec.model.digest, *(m.digest for m in (status.candidate, status.stable) if m is not None)}
    return replace(
        seen, evidence=tuple(e for e in seen.evidence if e.model_digest in digests),
        evidence_unread=tuple(u for u in seen.evidence_unread if u.model_digest is None or u.model_digest in digests))


def action_data(action: Action) -> dict[str, Any]:
    """An action for people and programs: its type and what it is about, without the service's template."""
    fields = {n: getattr(action, n) for n in action.__slots__ if n not in ("template", "model")}
    model = getattr(action, "model", None)
    return {"type": type(action).__name__, **fields, **({} if model is None else {"service": model.service})}


def rollout_data(rollout: ModelRollout) -> dict[str, Any]:
    """The object as JSON data; its own status, which nobody reads from there, is left out."""
    return rollout.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"status"})


@dataclass
class Encoder:
    """Turns → lines of one file. Remembers what was written, to write only changes."""

    version: str
    _rollout: ModelRollout | None = None
    _seen: dict[str, Any] = field(default_factory=dict[str, Any])
    _evidence: tuple[EvidenceSpec, ...] | None = None
    _numbers: dict[EvidenceSpec, int] = field(default_factory=dict[EvidenceSpec, int])

    def start(self, rollout: ModelRollout, status: RolloutStatus, now: datetime, lost: int = 0) -> dict[str, Any]:
        """The line before a first turn. `lost`: turns before it that were not written."""
        self._rollout, self._seen, self._evidence, self._numbers = rollout, {}, None, {}
        return {"kind": "start", "schema": SCHEMA, "hafnium": self.version, "time": now.isoformat(), **({"lost": lost} if lost else {}),
                "rollout": rollout_data(rollout), "status": status.model_dump(mode="json")}

    def turn(self, rollout: ModelRollout, seen: Observation, now: datetime, decision: Decision, after: str) -> dict[str, Any]:
        """The line of a turn. `seen` as `relevant` gives it."""
        line: dict[str, Any] = {"kind": "turn", "now": now.isoformat()}
        if rollout != self._rollout:
            self._rollout = rollout
            line["rollout"] = rollout_data(rollout)
        if self._evidence is None or seen.evidence != self._evidence:
            new = {e: i for i, e in enumerate((e for e in dict.fromkeys(seen.evidence) if e not in self._numbers), len(self._numbers))}
            self._numbers |= new
            self._evidence = seen.evidence
            line["findings"] = [[i, e.model_dump(mode="json")] for e, i in new.items()]
            line["evidence"] = [self._numbers[e] for e in seen.evidence]
        data = encode(replace(seen, evidence=()))
        line["seen"] = {k: v for k, v in data.items() if k not in self._seen or self._seen[k] != v}
        self._seen = data
        if decision.actions:
            line["actions"] = [action_data(a) for a in decision.actions]
        line["after"] = after
        return line


@dataclass(frozen=True, slots=True)
class Lines:
    """One turn, as it is written."""

    text: bytes
    begins: bool
    """A start is in it: it can be read without what was written before."""


class TurnEncoder:
    """Turns of one rollout → lines, in order. A start comes whenever the status isn't what the turn before had left."""

    def __init__(self, version: str) -> None:
        self._encoder = Encoder(version)
        self._after: RolloutStatus | None = None
        """The status that the last turn left; None when the next one needs a start."""

    def begin_anew(self) -> None:
        """What was encoded last can't be built on: it isn't in the file, or another file begins."""
        self._after = None

    def lines(
        self, rollout: ModelRollout, before: RolloutStatus, seen: Observation, now: datetime, decision: Decision, *, lost: int = 0,
    ) -> Lines:
        """The turn as lines. `lost`: turns before it that are not in the record; they are said in its start."""
        before = _decided(before, decision)
        known = self._after is not None and (self._after is before or self._after == before)
        self._after = None  # whatever fails below: the next turn doesn't build on this one
        lines = [] if known else [self._encoder.start(rollout, before, now, lost)]
        after = status_digest(decision.status)
        lines.append(self._encoder.turn(rollout, relevant(rollout, before, seen), now, decision, after))
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines).encode()
        self._after = decision.status
        return Lines(text, begins=not known)


def quiet(before: RolloutStatus, decision: Decision) -> bool:
    """A turn after the end that only reads counters on: weeks of it would push out what matters."""
    after = decision.status
    return before.phase in _ENDED and not decision.actions and not decision.events and (
        after == before or after.model_copy(update={"cursor": before.cursor}) == before)


def _decided(before: RolloutStatus, decision: Decision) -> RolloutStatus:
    """Without conditions that `decide` doesn't write: on a cluster the loop adds its own, and they are no part of the decisions."""
    own = {c.type for c in decision.status.conditions}
    if all(c.type in own for c in before.conditions):
        return before
    return before.model_copy(update={"conditions": tuple(c for c in before.conditions if c.type in own)})


@dataclass
class Decoder:
    """Lines → entries. After a line that can't be used, turns are left out until the next start."""

    source: str
    _rollout: ModelRollout | None = None
    _seen: dict[str, Any] = field(default_factory=dict[str, Any])
    _findings: dict[int, EvidenceSpec] = field(default_factory=dict[int, EvidenceSpec])
    _evidence: tuple[EvidenceSpec, ...] = ()

    def lost(self) -> None:
        """A line was damaged: what follows builds on it."""
        self._rollout = None

    def entry(self, line: dict[str, Any]) -> Start | RecordedTurn | None:
        """The entry of a line; None for a turn whose start is missing. Raises RecordError for what isn't a line of this schema."""
        try:
            if line["kind"] == "start":
                return self._start(line)
            if line["kind"] != "turn":
                raise RecordError(f"{self.source}: a line of kind {line['kind']!r}; expected start or turn")
            return None if self._rollout is None else self._turn(line, self._rollout)
        except (KeyError, TypeError, ValueError, AttributeError) as e:  # ValidationError is a ValueError
            text = str(e.errors()[0]["msg"]) if isinstance(e, ValidationError) else repr(e)
            raise RecordError(f"{self.source}: not a line of a record: {text}") from e

    def _start(self, line: dict[str, Any]) -> Start:
        if line["schema"] != SCHEMA:
            by = f"written by Hafnium {line.get('hafnium')} in schema {line['schema']}"
            raise RecordError(f"{self.source}: {by}; this one reads {SCHEMA}")
        rollout = ModelRollout.model_validate(line["rollout"])
        status = RolloutStatus.model_validate(line["status"])
        self._rollout, self._seen, self._findings, self._evidence = rollout, {}, {}, ()
        return Start(datetime.fromisoformat(line["time"]), str(line["hafnium"]), rollout, status, int(line.get("lost", 0)))

    def _turn(self, line: dict[str, Any], rollout: ModelRollout) -> RecordedTurn:
        if "rollout" in line:
            self._rollout = rollout = ModelRollout.model_validate(line["rollout"])
        self._findings |= {int(i): EvidenceSpec.model_validate(e) for i, e in line.get("findings", ())}
        if "evidence" in line:
            self._evidence = tuple(self._findings[int(i)] for i in line["evidence"])
        self._seen = {**self._seen, **cast("dict[str, Any]", line["seen"])}
        return RecordedTurn(
            now=datetime.fromisoformat(line["now"]), rollout=rollout, seen=replace(decode(self._seen), evidence=self._evidence),
            actions=tuple(line.get("actions", ())), after=str(line["after"]),
        )
