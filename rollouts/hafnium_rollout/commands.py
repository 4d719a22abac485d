"""What `hafnium rollout …` does: plain functions, a store (or a state folder) in, text or data out. The command line is wired elsewhere.

What is returned for people goes to a terminal, and holds what anybody wrote into an object: each such line goes through `one_line`.
None of them moves traffic. They write a wish beside the state, and the controller, which has all the rules, acts on it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from hafnium_contract.durations import format_duration
from hafnium_contract.errors import InputError
from hafnium_contract.shown_text import one_line
from hafnium_contract.whole_files import write_atomically
from hafnium_rollout.approvals import candidate_of
from hafnium_rollout.dossier.facts import from_record, from_store
from hafnium_rollout.dossier.page import page
from hafnium_rollout.errors import RecordError, RolloutFileError, StateError, UnknownRollout
from hafnium_rollout.objects import ApprovalSpec, ModelApproval, ModelRollout, ObjectMeta, UserAction, load_rollout
from hafnium_rollout.planning import expected_s, missed_max, plan_rollout, unplanned
from hafnium_rollout.record import read_record
from hafnium_rollout.replay_story import Summary, tell
from hafnium_rollout.reporting import weight_wanted
from hafnium_rollout.standing import Standing
from hafnium_rollout.state_folder import StateFolder
from hafnium_rollout.status import HistoryPoint, RolloutStatus
from hafnium_rollout.stores import RolloutStore, Where, store_at

UNKNOWN_SHOWN_MAX = 5
"""Fields of a newer operator that are named: enough to see what it is about."""
COLUMNS = ("NAME", "PHASE", "STEP", "WEIGHT", "GATE", "REASON", "AGE")
ActionType = Literal["Promote", "SkipStep", "Abort", "Retry"]


def apply(state: Path, file: Path) -> str:
    """Checks a ModelRollout file and makes it the wanted one. Returns a line for people.

    Raises InputError or RolloutFileError (every problem with its line); nothing is changed then.
    """
    rollout = load_rollout(file)
    folder = StateFolder(state)
    if not state.is_dir():
        raise InputError(f"{state}: no such state folder; start `hafnium up` with the model in production first, or give its --state")
    target = folder.rollout(rollout.name)
    text = file.read_text(encoding="utf-8")
    if target.is_file():
        old = load_rollout(target)
        if old.spec.model.name != rollout.spec.model.name:
            raise StateError(f"{file}: spec.model.name can't change ({old.spec.model.name} → {rollout.spec.model.name}); "
                             "make another ModelRollout")
        if target.read_text(encoding="utf-8") == text:
            return f"modelrollout {rollout.name} unchanged"
    existed = target.is_file()
    write_atomically(target, text)
    return f"modelrollout {rollout.name} {'configured' if existed else 'created'}"


def read_status(where: Where, name: str) -> RolloutStatus:
    """The rollout's status; an empty one when the controller hasn't looked yet. Raises UnknownRollout or StateError."""
    return store_at(where).known_status(name)[0]


def status(where: Where, name: str | None = None, *, now: datetime | None = None) -> dict[str, Any]:
    """Rows of all rollouts (or of one), with its gates: {"rollouts": [{"name", "phase", …, "gates": [{…}]}]}."""
    store = store_at(where)
    names = [name] if name is not None else store.names()
    return {"rollouts": [_row(n, *store.known_status(n), now or datetime.now(UTC)) for n in names]}


def _row(name: str, s: RolloutStatus, unknown: tuple[str, ...], now: datetime) -> dict[str, Any]:
    step = s.step
    weight = weight_wanted(s)
    return {
        "name": name, "phase": s.phase, "step": None if step is None else step.index, "weight": weight,
        "weightObserved": None if step is None else step.weight_observed,
        "shadow": step is not None and s.route is not None and s.route.shadow,
        "gate": s.gate,
        "reason": s.reason, "message": s.message,
        "ageSeconds": None if s.started_at is None else max(0.0, (now - s.started_at).total_seconds()),
        "candidate": None if s.candidate is None else s.candidate.model_dump(mode="json"),
        "stable": None if s.stable is None else s.stable.model_dump(mode="json"),
        "gates": [
            {"name": g.name, "role": g.role, "verdict": g.verdict, "statistic": g.statistic, "lower": g.lower, "upper": g.upper,
             "samples": g.samples, "missing": g.missing, "message": g.message} for g in s.gates
        ],
        "unknown": list(unknown),
    }


def status_table(where: Where, name: str | None = None, *, now: datetime | None = None) -> str:
    """NAME PHASE STEP WEIGHT GATE REASON AGE, and below it one line per gate and the message."""
    rows = status(where, name, now=now)["rollouts"]
    cells = [[
        r["name"], r["phase"], "-" if r["step"] is None else str(r["step"]), "shadow" if r["shadow"] else f"{r['weight']}%",
        r["gate"] or "-", r["reason"] or "-", "-" if r["ageSeconds"] is None else _age(r["ageSeconds"]),
    ] for r in rows]
    lines = _aligned([list(COLUMNS), *cells])
    for r in rows:
        if r["message"]:
            lines.append(f"{r['name']}: {r['message']}")
        lines += [f"  {g['name']:<14} {g['role']:<9} {g['verdict']:<13} {g['message']}" for g in r["gates"]]
        if r["unknown"]:
            left_out = ", ".join(r["unknown"][:UNKNOWN_SHOWN_MAX])
            lines.append(f"{r['name']}: not shown, because what wrote it is newer than this command: {left_out}")
    return "\n".join(one_line(line) for line in lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    rows = [[one_line(c) for c in r] for r in rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _age(seconds: float) -> str:
    return format_duration(timedelta(seconds=int(seconds)))


_ENDS = ("Promoted", "RolledBack", "Paused")


def watch(where: Where, name: str, wait: Callable[[float], object], *, poll_s: float = 1.0) -> Generator[HistoryPoint]:
    """Events (not the looks) of the rollout of the model that the file asks for, as they come, from its beginning on.

    Ends when that model is promoted, rolled back, or paused (which only a person ends); before the controller has taken it up it
    waits. `wait(seconds)` is called between two readings; raise in it to stop.
    """
    store = store_at(where)
    last: datetime | None = None
    told: set[tuple[datetime, str, str]] = set()
    while True:
        s = store.known_status(name)[0]
        wanted = _wanted(store, name)
        mine = s.candidate is not None and s.candidate.digest == wanted
        began = max((p.time for p in s.history if p.event in ("Started", "StableAskedAgain")), default=None)
        for point in s.history if mine else ():
            key = (point.time, point.event, point.message)
            late = (last is not None and point.time < last) or (began is not None and point.time < began)
            if point.event == "Look" or key in told or late:
                continue
            told = {k for k in told if k[0] >= point.time} | {key}
            last = point.time
            yield point
        asked = store.asked(name, s)  # a wish that nobody has looked at yet
        refused = not mine and s.phase in _ENDS and wanted in s.rejected_digests
        ended = (mine and s.phase in _ENDS) or refused or (s.candidate is None and _is_stable(s, wanted))
        if ended and not asked:
            return
        wait(poll_s)


def _wanted(store: RolloutStore, name: str) -> str | None:
    """The digest asked for; None when the object was deleted and only its status is still there."""
    try:
        return store.wanted(name)
    except UnknownRollout:
        return None


def wanted_digest(where: Where, name: str) -> str:
    """Digest of the model that is asked for. Raises UnknownRollout, StateError or RolloutFileError."""
    return store_at(where).wanted(name)


def _is_stable(status: RolloutStatus, digest: str | None) -> bool:
    return status.stable is not None and status.stable.digest == digest


def event_line(point: HistoryPoint) -> str:
    """One event for people: `12:00:01  StepEntered  step 1: the candidate gets 5 % of requests`."""
    return one_line(f"{point.time:%H:%M:%S}  {point.event:<20} {point.message}")


def plan(file: Path, *, rate: float, base: float, regression: float) -> dict[str, Any]:
    """What to expect before anything moves: times to Pass and Fail per step and gate, and the chances of being wrong.

    `rate` requests/s, `base` share of bad requests today, `regression` the additional share that must not be missed.
    Raises RolloutFileError, or InputError for numbers that are none.
    """
    rollout = load_rollout(file)
    try:
        rows = plan_rollout(rollout, rate=rate, base=base, regression=regression)
    except ValueError as e:
        raise InputError(f"{file}: {e}") from e
    alpha = max((g.compare.alpha for g in rollout.spec.gates if g.blocking), default=0.0)
    return {"rollout": rollout.name, "falseRollbackMax": alpha, "wrongPassMax": alpha, "missedMax": missed_max(rollout, rows),
            "expectedSeconds": expected_s(rollout, rows, rate=rate), "unplanned": unplanned(rollout), "gates": [asdict(r) for r in rows]}


def plan_table(file: Path, *, rate: float, base: float, regression: float) -> str:
    """The plan for people. Arguments and errors as in `plan`."""
    found = plan(file, rate=rate, base=base, regression=regression)

    def shown(seconds: float | None) -> str:
        return "never" if seconds is None else _age(seconds)

    rows = [["STEP", "GATE", "PASS", "PASS P90", "STEP TAKES", f"FAIL AT +{100 * regression:g} PT", "MISSED"]]
    rows += [[
        "shadow" if r["shadow"] else f"{r['weight']}%", r["gate"], shown(r["pass_s"]), shown(r["pass_s_p90"]),
        "pauses first" if r["pauses"] else shown(r["step_s"]), shown(r["fail_s"]), f"{100 * r['missed']:.1f} %",
    ] for r in found["gates"]]
    lines = _aligned(rows) if found["gates"] else ["no gate counts requests"]
    others = f", when {' and '.join(found['unplanned'])} pass in time, which no rate foretells" if found["unplanned"] else ""
    expected = found["expectedSeconds"]
    lines.append(
        f"an equal candidate has 100 % after about {_age(expected)}{others}" if expected is not None else
        "an equal candidate pauses before 100 %: a deadline comes before the Pass. Longer deadlines, more traffic or wider margins help")
    regressed = f"a regression of +{100 * regression:g} points is not failed"
    missed = found["missedMax"]
    lines.append(f"{regressed} by the end of the steps in at most {100 * missed:.1f} %" if missed is not None else
                 f"{regressed}: no gate that counts requests can take a candidate back")
    lines.append(f"an equal candidate is rolled back falsely, or a candidate beyond the margin passes a step, in at most "
                 f"{100 * found['falseRollbackMax']:g} % of rollouts each")
    return "\n".join(lines)


def promote(where: Where, name: str, reason: str = "", *, by: str = "", now: datetime | None = None) -> str:
    """Asks for 100 % at once: waits for no step and no gate. Approvals, readiness and the bake stay, and so does Safety's Fail."""
    return _ask(where, name, "Promote", reason, by, now)


def skip(where: Where, name: str, reason: str = "", *, by: str = "", now: datetime | None = None) -> str:
    """Asks for the next step without this one's verdict."""
    return _ask(where, name, "SkipStep", reason, by, now)


def abort(where: Where, name: str, reason: str = "", *, by: str = "", now: datetime | None = None) -> str:
    """Asks to take the candidate back and to remember its digest as rejected."""
    return _ask(where, name, "Abort", reason, by, now)


def retry(where: Where, name: str, reason: str = "", *, by: str = "", now: datetime | None = None) -> str:
    """Asks a paused rollout to go on, or an ended one to try the same digest again."""
    return _ask(where, name, "Retry", reason, by, now)


def _ask(where: Where, name: str, kind: ActionType, reason: str, by: str, now: datetime | None) -> str:
    store = store_at(where)
    when = now or datetime.now(UTC)
    wish = {"type": kind, "id": f"{when:%Y%m%dT%H%M%S%f}-{secrets.token_hex(3)}", "reason": reason, "requestedBy": by[:200]}
    standing = store.standing(name)
    try:
        digest = _digest_about(store, name, kind, standing)
    except (StateError, RolloutFileError) as e:
        hand = store.by_hand(name, wish | {"candidateDigest": "sha256:DIGEST"})
        raise StateError(f"{e}\nso it isn't known which model this is about. By hand, with the candidate's digest: {hand}") from e
    try:
        action = UserAction.model_validate(wish | {"candidateDigest": digest})
    except ValidationError as e:
        raise InputError(f"--reason: {e.errors()[0]['msg']}, it has {len(reason)}") from e
    replaced = store.ask(name, action)
    replaced = f"; it takes the place of an earlier wish: {replaced}" if replaced else ""
    doubt = f" (what the file asks for, since the status can't be read: {standing.doubt})" if standing.doubt else ""
    return one_line(f"asked for {kind} of {digest[:19]}{doubt}{replaced}; `hafnium rollout status {name}` shows what becomes of it")


def _digest_about(store: RolloutStore, name: str, kind: ActionType, standing: Standing) -> str:
    """What a person sees in the status is what they decide about; Retry is about what the file asks for, unless it is paused.

    The rest of spec and status isn't looked at: an abort must not fail for it.
    """
    if standing.candidate is None or (kind == "Retry" and standing.phase != "Paused"):
        return store.wanted(name)
    if not standing.candidate:
        raise StateError(f"{name}: status.candidate.digest can't be read")
    return standing.candidate


@dataclass(frozen=True, slots=True)
class _Reviewed:
    """A model that somebody may have reviewed."""

    digest: str
    version: str
    trained_by: str
    why: str


def approve(where: Where, name: str, stage: str, approver: str, digest: str | None = None, *, again: str = "") -> str:
    """Writes the approval of a model of this rollout for a stage: the one that `digest` (a prefix) names.

    Without it, on one machine, of the only one there is. On a cluster the API server checks that the approver is who writes; what is
    written can't be taken back, and what the spec says may have changed since the approver read about it. `again`: the command as it
    was typed, for the error that says what to add to it.
    """
    store = store_at(where)
    rollout = store.rollout(name)
    models = _to_approve(rollout, store.known_status(name)[0])
    again = again or f"hafnium rollout approve {name} --stage {stage}"
    if digest is None and (store.shared or len(models) > 1):
        raise InputError(f"say which model you reviewed, since others may come while you read; nothing was approved. There is:\n"
                         f"{_listed(models, again)}")
    found = models if digest is None else [m for m in models if m.digest.startswith(f"sha256:{_hex(digest)}")]
    if len(found) != 1:
        raise InputError(f"--digest {digest}: no model of {name}; nothing was approved. There is, which you may not have reviewed:\n"
                         f"{_listed(models, again)}")
    model = found[0]
    if model.trained_by and model.trained_by == approver:
        raise InputError(
            f"{approver} trained {rollout.spec.model.name} {model.version} (spec.model.trainedBy): somebody else has to approve it")
    try:
        given = ApprovalSpec(model_digest=model.digest, stage=stage, approver=approver)
    except ValidationError as e:
        raise InputError(f"--stage {stage!r}: expected a name such as validation or model-risk (lower-case letters, digits, -)") from e
    meta = ObjectMeta(name=f"{name}-{model.digest[7:15]}", namespace=rollout.metadata.namespace)
    store.approve(ModelApproval(metadata=meta, spec=given))
    more = "" if stage in rollout.spec.approvals.required else (
        f" (required are: {', '.join(rollout.spec.approvals.required) or 'none'})")
    return one_line(f"{approver} approved version {model.version}, {model.digest[:19]}, for {stage}{more}")


def _to_approve(rollout: ModelRollout, status: RolloutStatus) -> list[_Reviewed]:
    """The model under way, whose approvals are counted now, and the one that is asked for, if that is another."""
    wanted, candidate = rollout.spec.model, status.candidate
    if candidate is None or not candidate.digest or status.phase in ("Promoted", "RolledBack") or candidate.digest == wanted.digest:
        same = candidate is not None and candidate.digest == wanted.digest
        trained_by = candidate_of(rollout, status)[1] if same else wanted.trained_by or ""
        return [_Reviewed(wanted.digest, wanted.version, trained_by, "the one that the ModelRollout asks for")]
    return [
        _Reviewed(candidate.digest, candidate.version, candidate.trained_by, "the one under way"),
        _Reviewed(wanted.digest, wanted.version, wanted.trained_by or "", "the one that the ModelRollout asks for next"),
    ]


def _listed(models: list[_Reviewed], again: str) -> str:
    return "\n".join(
        f"  version {one_line(m.version)}, {m.digest}, trained by {one_line(m.trained_by) or 'an unknown person'}, {m.why}:\n"
        f"    {again} --digest {m.digest.removeprefix('sha256:')}" for m in models)


def _hex(digest: str) -> str:
    """The hex digits of a digest or of its beginning. Raises InputError."""
    digits = digest.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{12,64}", digits):
        raise InputError(f"--digest {digest}: expected 12 to 64 hex digits, with or without sha256: before them")
    return digits


def replay(
    record: Path, other: ModelRollout | None, until: datetime | None, summary: Summary, *, keep: bool = False,
) -> Generator[str]:
    """The record's decisions again, a line for each; with another ModelRollout's gates, strategy and approvals what they would have
    been. `summary` is whole when the last line has come. Raises RecordError."""
    yield from map(one_line, tell(read_record(record), other, until, summary, keep=keep))


def report(where: Where, name: str, *, now: datetime | None = None) -> str:
    """The page of evidence about the rollout's last run. Raises UnknownRollout, StateError or RecordError."""
    return page(from_store(store_at(where), name, now or datetime.now(UTC)))


def report_of_record(record: Path, *, now: datetime | None = None) -> str:
    """The same from a record alone. Raises RecordError."""
    return page(from_record(record, now or datetime.now(UTC)))


def record_of(where: Where, name: str) -> Path:
    """The rollout's record. Raises UnknownRollout, or RecordError where it can't be read from here."""
    store = store_at(where)
    found = store.record(name)
    if found is None:
        raise RecordError(
            f"the record of {name} is on the operator's volume; copy it from there (docs/rollout-commands.md) and give --record")
    if not found.is_dir():
        store.standing(name)  # says which rollouts there are
    return found
