"""What a report is made of, gathered from a store or from a record alone, with a sha256 of each input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.approvals import Counted, candidate_of, count
from hafnium_rollout.errors import RecordError, UnknownRollout
from hafnium_rollout.objects import ApprovalSpec, ModelRollout, UserAction
from hafnium_rollout.record import files_of_run, hafnium_version, read_files, record_files
from hafnium_rollout.record_lines import Gap, RecordedTurn, Start, rollout_data
from hafnium_rollout.replaying import ReplayedTurn, replay
from hafnium_rollout.status import HistoryPoint, ModelSeen, RolloutStatus
from hafnium_rollout.stores import Approval, RolloutStore


@dataclass(frozen=True, slots=True)
class Asked:
    """A person's wish, as the controller first saw it."""

    time: datetime | None
    """When that was; None where only the ModelRollout tells of it."""
    action: UserAction


@dataclass(frozen=True, slots=True)
class Source:
    """One input of the report."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the page shows."""

    rollout: ModelRollout
    status: RolloutStatus
    history: tuple[HistoryPoint, ...]
    """Of the last run: from its Started on, and not what came after it."""
    evidence: tuple[EvidenceSpec, ...]
    """Findings about candidate and stable, oldest first."""
    approvals: tuple[Approval, ...]
    approved_digest: str
    """Of the model that approvals are needed for: the one under way, not a queued one; later that of the last run."""
    trained_by: str
    """Who trained that one; empty when it isn't known."""
    counted: Counted
    """Approvals of that model, by the rule that the controller has."""
    asked: tuple[Asked, ...]
    acted_on: frozenset[str]
    """Ids of wishes that were acted on. Those that the status has forgotten since are in it where a record tells of them."""
    asked_from_record: bool
    """`asked` is every wish of the recorded time. Otherwise it is what the ModelRollout still holds: the last one."""
    replayed: str
    """What a replay of the record came to."""
    sources: tuple[Source, ...]
    made_at: datetime
    version: str
    unknown: tuple[str, ...] = ()
    """Fields of the status that this version doesn't know: neither the page nor its sums hold them."""

    @property
    def candidate(self) -> ModelSeen | None:
        """The model that the last run was about, also after the stable one was asked for again."""
        return self.status.taken_back or self.status.candidate

    @property
    def sha256(self) -> str:
        """Of all inputs: the lines `sha256  name` of the sources, as sha256sum writes them."""
        return hashlib.sha256("".join(f"{s.sha256}  {s.name}\n" for s in self.sources).encode()).hexdigest()


def from_store(store: RolloutStore, name: str, now: datetime) -> Facts:
    """Facts about a rollout of a store. Raises UnknownRollout, StateError or RecordError."""
    status, unknown = store.known_status(name)
    record = store.record(name)
    files = files_of_run(record, status.run_id) if record is not None else []
    recorded = _Recorded.read(files) if files else None
    try:
        rollout = store.rollout(name)
    except UnknownRollout:
        if recorded is None:
            raise
        rollout = recorded.rollout  # the object was deleted; what it said is in the record
    approvals = store.approvals()
    given = [ApprovalSpec(model_digest=a.digest, stage=a.stage, approver=a.approver) for a in approvals]
    counted = count(given, *_about(rollout, status))
    evidence = (*store.evidence(), *(recorded.evidence if recorded is not None else ()))
    found = _facts(rollout, status, dict.fromkeys(evidence), approvals, counted, recorded, files, now)
    return replace(found, unknown=unknown)


def from_record(path: Path, now: datetime) -> Facts:
    """Facts from a record alone (a file or a folder): the status is the one that its replay ends in. Raises RecordError."""
    files = record_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise RecordError(f"{path}: no record of a rollout")
    recorded = _Recorded.read(files)
    approvals = [Approval(recorded.approved_digest, stage, "(not in the record)", t) for stage, t in recorded.approved.items()]
    # A run that began with the last turn: what that turn saw was about the model before.
    same = recorded.approved_digest == _about(recorded.rollout, recorded.status)[0]
    counted = recorded.counted if same else Counted()
    return _facts(recorded.rollout, recorded.status, recorded.evidence, approvals, counted, recorded, files, now)


def _facts(
    rollout: ModelRollout, status: RolloutStatus, evidence: Iterable[EvidenceSpec], approvals: Iterable[Approval],
    counted: Counted, recorded: _Recorded | None, files: Sequence[Path], now: datetime,
) -> Facts:
    models = (status.candidate, status.stable, status.taken_back, *status.previous[:1])
    digests = {rollout.spec.model.digest, *(m.digest for m in models if m is not None)}
    mine = tuple(sorted((e for e in evidence if e.model_digest in digests), key=lambda e: (e.window_end, e.kind)))
    given = tuple(sorted((a for a in approvals if a.digest in digests), key=lambda a: (a.time or now, a.stage)))
    sources = [
        _source("modelrollout.json", rollout_data(rollout)), _source("status.json", status.model_dump(mode="json", by_alias=True)),
        _source("evidence.json", [e.model_dump(mode="json", by_alias=True) for e in mine]),
        _source("approvals.json", [[a.digest, a.stage, a.approver, a.time.isoformat() if a.time else None] for a in given]),
    ]
    sources += [_file(f) for f in files]
    about, trained_by = _about(rollout, status)
    last = rollout.spec.action
    asked = recorded.asked if recorded is not None else (Asked(None, last),) if last is not None else ()
    return Facts(
        rollout=rollout, status=status, history=last_run(status), evidence=mine, approvals=given,
        approved_digest=about, trained_by=trained_by, counted=counted, asked=asked,
        acted_on=frozenset(status.handled_actions) | (recorded.acted_on if recorded is not None else frozenset()),
        asked_from_record=recorded is not None, sources=tuple(sources), made_at=now, version=hafnium_version(),
        replayed=recorded.sentence if recorded is not None else "there is no record of the turns, so nothing was replayed",
    )


def _about(rollout: ModelRollout, status: RolloutStatus) -> tuple[str, str]:
    """Digest and trainer of the model whose approvals the report shows."""
    last = status.taken_back
    return (last.digest, last.trained_by) if last is not None else candidate_of(rollout, status)


def last_run(status: RolloutStatus) -> tuple[HistoryPoint, ...]:
    """Points from the last Started on; all of them when it is no longer remembered. What came after the run is not about its candidate."""
    started = [i for i, p in enumerate(status.history) if p.event == "Started"]
    points = status.history[started[-1]:] if started else status.history
    over = [i for i, p in enumerate(points) if p.event == "StableAskedAgain"] if started else []
    return points[:over[0]] if over else points


def _source(name: str, data: Any) -> Source:
    """Of data that lives in an API server or in several files: its JSON with sorted keys and no blanks."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return Source(name, hashlib.sha256(text).hexdigest(), len(text))


def _file(path: Path) -> Source:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return Source(path.name, digest, path.stat().st_size)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a record says, in one pass over it."""

    rollout: ModelRollout
    status: RolloutStatus
    evidence: tuple[EvidenceSpec, ...]
    """All that turns of the last run saw, and later ones: what was removed since is still what it was decided on."""
    asked: tuple[Asked, ...]
    acted_on: frozenset[str]
    approved: dict[str, datetime]
    """Stage → when it was first seen to be approved."""
    approved_digest: str
    """Of the model that `approved` and `counted` are about."""
    counted: Counted
    """As the last turn about that model saw them."""
    sentence: str

    @classmethod
    def read(cls, files: Sequence[Path]) -> _Recorded:
        asked: dict[str, Asked] = {}
        findings: dict[EvidenceSpec, None] = {}
        acted_on: set[str] = set()
        approved: dict[str, datetime] = {}
        last: list[RecordedTurn] = []
        status, about, counted = RolloutStatus(), "", Counted()

        def watched() -> Iterable[Start | RecordedTurn | Gap]:
            nonlocal status, about, counted
            for entry in read_files(files):
                if isinstance(entry, Start):
                    status = entry.status
                if isinstance(entry, RecordedTurn):
                    for action in entry.seen.actions:
                        asked.setdefault(action.id, Asked(entry.now, action))
                    if entry.rollout.spec.action is not None:
                        asked.setdefault(entry.rollout.spec.action.id, Asked(entry.now, entry.rollout.spec.action))
                    if status.taken_back is None:  # else these are asked for the stable model, and no run is about that
                        digest = candidate_of(entry.rollout, status)[0]  # by the status before the turn, as the controller asked
                        if digest != about:
                            approved.clear()
                        about, counted = digest, Counted(entry.seen.approvals, entry.seen.approvals_refused)
                        for stage in sorted(entry.seen.approvals):
                            approved.setdefault(stage, entry.now)
                    last[:] = [replace(entry)]
                yield entry

        turns = different = breaks = 0
        run = ""
        for turn in replay(watched()):
            if isinstance(turn, ReplayedTurn):
                if turn.recorded.status.run_id != run:
                    findings.clear()
                    run = turn.recorded.status.run_id
                acted_on.update(turn.recorded.status.handled_actions)
                findings |= dict.fromkeys(last[0].seen.evidence)
                turns, different, status = turns + 1, different + (not turn.equal), turn.recorded.status
            else:
                breaks += 1
        if not last:
            raise RecordError(f"{files[0].parent}: the record holds no turn")
        exact = "every decision was found again from what was recorded" if not different else (
            f"{different} of them do NOT end as recorded: another version decided, or the record was changed")
        sentence = f"{turns} recorded turns were decided again: {exact}" + (f"; turns are missing in {breaks} places" if breaks else "")
        return cls(last[0].rollout, status, tuple(findings), tuple(asked.values()), frozenset(acted_on), approved, about, counted, sentence)
