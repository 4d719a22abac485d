"""The state folder of one machine, as far as rollouts use it: paths, atomic writes, and what its files say.

Every file is written beside its place and renamed, so a reader sees the old or the new one and never half of it.
"""

from __future__ import annotations

import json
import pwd
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError

from hafnium_contract.evidence import EvidenceError, EvidenceSpec, parse_evidence
from hafnium_rollout.errors import StateError
from hafnium_rollout.objects import ApprovalSpec, ModelApproval, UserAction
from hafnium_rollout.observation import EvidenceUnread, RouteSeen, ServiceSeen

ROLLOUT_LABEL = "hafnium.dev/rollout"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "hafnium-rollout"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
EVIDENCE_MAX = 5_000
"""Newest files that are looked at: a job every minute for three days."""


@dataclass(frozen=True)
class StateFolder:
    """Paths below one state folder."""

    root: Path

    @property
    def objects(self) -> Path:
        return self.root / "objects"

    @property
    def actions(self) -> Path:
        return self.root / "actions"

    @property
    def evidence(self) -> Path:
        return self.root / "evidence"

    @property
    def approvals(self) -> Path:
        return self.root / "approvals"

    @property
    def lock(self) -> Path:
        return self.root / "rollout-controller.lock"

    def rollout(self, name: str) -> Path:
        return self.objects / f"ModelRollout-{name}.yaml"

    def service(self, name: str) -> Path:
        return self.objects / f"InferenceService-{name}.yaml"

    def route(self, name: str) -> Path:
        return self.root / "routes" / f"{name}.json"

    def status(self, name: str) -> Path:
        return self.root / "status" / f"ModelRollout-{name}.json"

    def last_good(self, name: str) -> Path:
        """Copy of the last readable object: a broken file must not leave a candidate unguarded, also after a restart."""
        return self.root / "status" / f"ModelRollout-{name}.last-good.yaml"

    def last_good_names(self) -> list[str]:
        ending = ".last-good.yaml"
        found = (self.root / "status").glob(f"ModelRollout-*{ending}")
        return sorted(p.name.removeprefix("ModelRollout-").removesuffix(ending) for p in found)

    def record(self, name: str) -> Path:
        """Folder with every turn of the rollout, as record.py writes it. Kept when the rollout is deleted: it is evidence."""
        return self.root / "record" / f"ModelRollout-{name}"

    @property
    def notifications(self) -> Path:
        """What each receiver was sent."""
        return self.root / "notifications"

    @property
    def retraining(self) -> Path:
        """Proposals of new trainings, and what became of them."""
        return self.root / "retraining"

    def log(self, service: str) -> Path:
        return self.root / "inference-log" / service

    def rollout_names(self) -> list[str]:
        """Names of all rollouts that are wanted."""
        return sorted(p.stem.removeprefix("ModelRollout-") for p in self.objects.glob("ModelRollout-*.yaml"))

    def status_names(self) -> list[str]:
        return sorted(p.stem.removeprefix("ModelRollout-") for p in (self.root / "status").glob("ModelRollout-*.json"))


def read_json(path: Path) -> Any:
    """Data of a JSON file. Raises FileNotFoundError when there is none, StateError when it isn't JSON or can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise StateError(f"{path}: can't be read: {e}") from e


def admin_port(state: StateFolder) -> int:
    """Envoy's admin port from runtime.json. Raises StateError when the runtime isn't up."""
    path = state.root / "runtime.json"
    try:
        port = read_json(path).get("adminPort")
    except FileNotFoundError as e:
        raise StateError(f"{path}: missing; is `hafnium up` running?") from e
    if not isinstance(port, int):
        raise StateError(f"{path}: adminPort is {port!r}, expected a port")
    return port


def read_services(state: StateFolder) -> dict[str, ServiceSeen]:
    """services.json. Raises StateError when it is missing or of another form: an unknown list is not an empty one."""
    path = state.root / "services.json"
    try:
        rows = cast("list[dict[str, Any]]", read_json(path)["services"])
        found = [
            ServiceSeen(
                name=str(r["name"]), digest=str(r.get("modelDigest") or ""), ready=r.get("ready") is True,
                restarts=int(r.get("restarts") or 0), version=str(r.get("modelVersion") or ""), message=str(r.get("message") or ""),
            )
            for r in rows
        ]
    except FileNotFoundError as e:
        raise StateError(f"{path}: missing; is `hafnium up` running?") from e
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise StateError(f"{path}: not a list of services: {e!r}") from e
    return {s.name: s for s in found}


def read_route(state: StateFolder, name: str) -> RouteSeen | None:
    """routes/<name>.json, or None when there is certainly none. Raises StateError when it can't be understood."""
    path = state.route(name)
    try:
        data = read_json(path)
        info = path.stat()
    except FileNotFoundError:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("stable"), str):
        raise StateError(f"{path}: expected name, stable, candidate, weight, shadow")
    candidate, weight = data.get("candidate"), data.get("weight", 0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 100:
        raise StateError(f"{path}: weight must be a number from 0 to 100, got {weight!r}")
    written = datetime.fromtimestamp(info.st_mtime, UTC)
    return RouteSeen(
        stable=data["stable"], candidate=candidate if isinstance(candidate, str) else None, weight=round(weight),
        shadow=data.get("shadow") is True, manager=f"user {_user(info.st_uid)} ({path.name}, {written:%H:%M:%S} UTC)",
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def read_actions(state: StateFolder, rollout: str) -> list[tuple[Path, UserAction | str]]:
    """The rollout's waiting actions, oldest first by file name; one that can't be read comes as its error."""
    out: list[tuple[Path, UserAction | str]] = []
    for path in sorted(state.actions.glob(f"ModelRollout-{rollout}.*.json")):
        try:
            out.append((path, UserAction.model_validate(read_json(path))))
        except FileNotFoundError:
            continue
        except (StateError, ValidationError) as e:
            out.append((path, f"{path}: not an action: {e}"))
    return out


def read_approvals(state: StateFolder) -> list[ApprovalSpec]:
    """All approvals. A file that can't be read approves nothing."""
    out: list[ApprovalSpec] = []
    for path in [*sorted(state.approvals.glob("*.json")), *sorted(state.objects.glob("ModelApproval-*.yaml"))]:
        try:
            out.append(ModelApproval.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).spec)
        except (OSError, ValueError, yaml.YAMLError):
            continue
    return out


class EvidenceReader:
    """Evidence of the folder. Files never change, so each is parsed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, EvidenceSpec | EvidenceUnread] = {}

    def read(self) -> tuple[tuple[EvidenceSpec, ...], tuple[EvidenceUnread, ...], str]:
        """All evidence, what can be told of files that can't be understood, and why the folder can't be read ('' when it can)."""
        if not self._folder.is_dir():
            return (), (), ""
        try:
            paths = sorted(self._folder.glob("*.json"), key=lambda p: p.stat().st_mtime)[-EVIDENCE_MAX:]
        except OSError as e:
            return *self._parts(), f"{self._folder}: {e}"
        known: dict[str, EvidenceSpec | EvidenceUnread] = {}
        for path in paths:
            found = self._known.get(path.name)
            known[path.name] = found if isinstance(found, EvidenceSpec) else _evidence(path)
        self._known = known
        return *self._parts(), ""

    def _parts(self) -> tuple[tuple[EvidenceSpec, ...], tuple[EvidenceUnread, ...]]:
        found = self._known.values()
        return tuple(s for s in found if isinstance(s, EvidenceSpec)), tuple(s for s in found if isinstance(s, EvidenceUnread))


def _evidence(path: Path) -> EvidenceSpec | EvidenceUnread:
    data: Any = None
    try:
        data = read_json(path)
        return parse_evidence(data, str(path)).spec
    except (EvidenceError, StateError, FileNotFoundError) as e:
        spec = cast("dict[str, Any]", data).get("spec") if isinstance(data, dict) else None
        return evidence_unread(f"{e}; remove the file, or let its job write a new one", spec, _stored_at(path))


def _stored_at(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def evidence_unread(error: str, spec: Any, created_at: datetime | None) -> EvidenceUnread:
    """What can be told of a finding that can't be understood: which model and kind, where at least those are what they should be."""
    fields = cast("dict[str, Any]", spec) if isinstance(spec, dict) else {}
    digest = fields.get("modelDigest", fields.get("model_digest"))
    kind = fields.get("kind")
    return EvidenceUnread(
        error, digest if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None,
        kind if kind in get_args(EvidenceSpec.model_fields["kind"].annotation) else None, created_at)
