"""`--every`: a CronJob in little, for one machine. Looks at the log every few seconds and closes one window after the other.

Windows of one model never overlap, since BH over looks counts each row once. A window ends when both arms have enough rows, at
the latest after `window_s_max` (then it is NoData): how long it is depends on traffic only and never on what was found. When
a route changes (another candidate, weight, shadow on or off), the open window is dropped and the next begins after the change:
the rollout counts only windows that lie wholly after it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

import yaml

from hafnium_contract.bundle import open_bundle
from hafnium_contract.errors import HafniumError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_monitoring.drift import DriftOptions, run_drift
from hafnium_monitoring.errors import StateError, UnwrittenError
from hafnium_monitoring.evidence_places import FolderEvidence, write_with_report
from hafnium_monitoring.settings import LoopSettings
from hafnium_monitoring.windows import STABLE_ARMS, InferenceLog, Selection, candidate_arms

_LOG = logging.getLogger("hafnium.monitoring")
FLUSH_ARGUMENT = "--log_flush_seconds"
FLUSH_S_DEFAULT = 10.0
"""The transformer's own default."""
FLUSH_VARIABLE = "HAFNIUM_LOG_FLUSH_SECONDS"
FLUSH_SLACK_S = 1.0
"""Writing the file takes a moment after the flush began."""
FLUSH_LAG_S_DEFAULT = FLUSH_S_DEFAULT + FLUSH_SLACK_S
UNWRITTEN_MAX = 100
"""Findings that wait for a folder that takes them again; beyond, the oldest is dropped, and its verdict is in the log."""
FILE_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True)
class Target:
    """One model to watch, and the stable one that it is compared with (None: on its own)."""

    name: str
    bundle: Path
    digest: str | None
    """The digest that is said to be live; None: whatever the bundle has."""
    logs: tuple[Path | str, ...]
    stable_bundle: Path | None
    stable_digest: str | None
    """The same of the stable model."""
    signature: str
    """Changes whenever traffic does: the open window is then dropped."""
    all_traffic: bool = False
    """The candidate has weight 100: a window doesn't wait for rows of the stable model."""
    log_lag_s: float = 0.0
    """How late its rows may reach the log; the window ends at least so long before now."""


class TargetSource(Protocol):
    def targets(self) -> tuple[Target, ...]:
        """What is live now. Raises StateError when that can't be known."""
        ...


@dataclass(frozen=True)
class FixedTargets:
    """The models named on the command line."""

    fixed: tuple[Target, ...]

    def targets(self) -> tuple[Target, ...]:
        return self.fixed


@dataclass(frozen=True)
class StateFolder:
    """The state folder of `hafnium up`: routes say who is stable and who candidate, services which digest each has."""

    folder: Path

    def targets(self) -> tuple[Target, ...]:
        """One target per route: its candidate against its stable, or its stable alone. Raises StateError, naming the file."""
        services = self._services()
        found: list[Target] = []
        for path in sorted((self.folder / "routes").glob("*.json")):
            route = _mapping(_json(path), path)
            stable, candidate = route.get("stable"), route.get("candidate")
            model = candidate or stable
            if not isinstance(model, str) or model not in services or (stable and stable not in services):
                continue  # the supervisor hasn't started that service yet: nothing can be in its log
            pair = candidate is not None and isinstance(stable, str) and stable != candidate
            arms = [model, stable] if pair and isinstance(stable, str) else [model]
            live = {k: route.get(k) for k in ("stable", "candidate", "weight", "shadow")}
            live["digests"] = [services[arm] for arm in arms]
            found.append(Target(
                name=str(route.get("name", path.stem)), bundle=self._bundle(model), digest=services[model],
                logs=tuple(self.folder / "inference-log" / arm for arm in arms),
                stable_bundle=self._bundle(stable) if pair and isinstance(stable, str) else None,
                stable_digest=services[stable] if pair and isinstance(stable, str) else None,
                signature=json.dumps(live, sort_keys=True), all_traffic=pair and route.get("weight") == 100,
                log_lag_s=max(self._log_lag_s(arm) for arm in arms),
            ))
        return tuple(found)

    def _log_lag_s(self, service: str) -> float:
        """How long the service's transformer keeps rows in memory, by its arguments; 0 when there is no transformer, its default when
        they can't be understood."""
        path = self._object(service)
        data: Any = _mapping(_load(path, yaml.safe_load), path)
        for key in ("spec", "transformer", "containers"):
            data = data.get(key) if isinstance(data, dict) else None
        containers: list[dict[str, Any]] = [c for c in _items(data) if isinstance(c, dict)]
        if not containers:
            return 0.0
        arguments = [str(a) for c in containers for a in _items(c.get("args"))]
        found = re.findall(rf"(?:^|\s){FLUSH_ARGUMENT}(?:=|\s+)(\S+)", " ".join(arguments)) or [
            e.get("value") for c in containers for e in _items(c.get("env")) if isinstance(e, dict) and e.get("name") == FLUSH_VARIABLE]
        if not found:
            return FLUSH_LAG_S_DEFAULT
        try:
            flush_s = float(str(found[-1]).strip("'\""))  # of an argument that is given twice the last one counts
        except ValueError:
            flush_s = math.nan
        if not (math.isfinite(flush_s) and flush_s > 0):
            # Said and not raised: the other routes, and this one, are better watched by a guess than not at all
            _LOG.error(
                "%s: %s: expected seconds above 0, got %r; taken as the transformer's default of %g s: rows that are later are missing in "
                "its windows, so correct it", path, FLUSH_ARGUMENT, found[-1], FLUSH_S_DEFAULT,
            )
            return FLUSH_LAG_S_DEFAULT
        return flush_s + FLUSH_SLACK_S

    def _services(self) -> dict[str, str]:
        """Service → model digest, of those whose digest is known."""
        path = self.folder / "services.json"
        if not path.exists():
            return {}
        listed = _mapping(_json(path), path).get("services")
        if not isinstance(listed, list):
            raise StateError(f"{path}: expected a list under `services`")
        out: dict[str, str] = {}
        for item in listed:
            service = _mapping(item, path)
            name, digest = service.get("name"), service.get("modelDigest")
            if isinstance(name, str) and isinstance(digest, str) and digest.startswith("sha256:"):
                out[name] = digest
        return out

    def _object(self, service: str) -> Path:
        return self.folder / "objects" / f"InferenceService-{service}.yaml"

    def _bundle(self, service: str) -> Path:
        path = self._object(service)
        data: Any = _mapping(_load(path, yaml.safe_load), path)
        for key in ("spec", "predictor", "model", "storageUri"):
            data = data.get(key) if isinstance(data, dict) else None
        url = urlparse(data) if isinstance(data, str) else None
        if url is None or url.scheme != "file" or not url.path:
            raise StateError(f"{path}: spec.predictor.model.storageUri: expected file:///…, got {data!r}")
        return Path(unquote(url.path))


def _load(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise StateError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise StateError(f"{path}: can't be read: {e}") from e
    except RecursionError as e:
        raise StateError(f"{path}: can't be read: nested too deeply") from e


def _json(path: Path) -> Any:
    return _load(path, json.loads)


def _items(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise StateError(f"{path}: expected an object, got {type(data).__name__}")
    return data


@dataclass
class _Watched:
    """What the loop remembers of one target."""

    signature: str
    start: datetime
    log: InferenceLog
    manifests: dict[Path, tuple[str, str]] = field(default_factory=dict)
    """Bundle → digest and version; a bundle never changes, so it is opened (and hashed) for this once."""


class DriftLoop:
    """The state between ticks: where each target's next window begins."""

    def __init__(self, source: TargetSource, evidence: Path, settings: LoopSettings) -> None:
        self._source = source
        self._evidence = evidence
        self._settings = settings
        self._watched: dict[str, _Watched] = {}
        self._unwritten: list[EvidenceSpec] = []

    @property
    def every_s(self) -> float:
        return self._settings.every_s

    def tick(self, now: datetime) -> list[EvidenceSpec]:
        """Closes every window that is due, writes its evidence and returns what was written. Keeps going when a target fails."""
        waiting, self._unwritten = self._unwritten, []  # what the last tick could not write: a closed window is not looked at again
        written = self._write(waiting)
        try:
            targets = self._source.targets()
        except StateError as e:
            # Nobody knows which model is live, so there is no digest to write evidence about: silence is NoData to the rollout.
            _LOG.error("%s", e)
            return written
        except Exception:  # noqa: BLE001 - a state of a form that nobody thought of must not end the loop: the next tick sees another
            _LOG.exception("the state can't be understood")
            return written
        self._watched = {t.name: self._watched[t.name] for t in targets if t.name in self._watched}
        for target in targets:
            evidence = self._look(target, now)
            if evidence is not None:
                written += self._write((evidence,))
        return written

    def _write(self, found: Sequence[EvidenceSpec]) -> list[EvidenceSpec]:
        """Writes these findings and returns those that are written; what the folder doesn't take is kept for the next tick."""
        written: list[EvidenceSpec] = []
        for evidence in found:
            try:
                write_with_report(FolderEvidence(self._evidence), evidence, self._settings.report.keep)
                written.append(evidence)
            except UnwrittenError as e:
                _LOG.error("%s; it is tried again", e)
                # Its report is gone: of 100 findings that wait, reports would be 400 MB on a disk that may be full
                self._unwritten.append(evidence.model_copy(update={"report": ""}))
            except HafniumError as e:
                _LOG.error("%s; not written: %s of %s: %s", e, evidence.verdict, evidence.model_digest[:15], evidence.message)
        for lost in self._unwritten[:-UNWRITTEN_MAX]:
            _LOG.error("given up, since %s wait: %s of %s: %s", UNWRITTEN_MAX, lost.verdict, lost.model_digest[:15], lost.message)
        del self._unwritten[:-UNWRITTEN_MAX]
        return written

    def _look(self, target: Target, now: datetime) -> EvidenceSpec | None:
        settings = self._settings
        watched = self._watched.get(target.name)
        if watched is None or watched.signature != target.signature:
            first = watched is None
            start = now if first else now + timedelta(seconds=settings.settle_s)
            self._watched[target.name] = _Watched(target.signature, start, InferenceLog(target.logs))
            return None
        end = now - timedelta(seconds=max(settings.log_lag_s, target.log_lag_s))
        if end <= watched.start:
            return None
        full = end - watched.start >= timedelta(seconds=settings.window_s_max)
        if not full and not self._enough(target, watched, end):
            return None
        options = DriftOptions(
            bundle=target.bundle, logs=target.logs, start=watched.start, end=end, stable_bundle=target.stable_bundle,
            all_traffic=target.all_traffic, expect_digest=target.digest,
            expect_stable_digest=target.stable_digest, rules=settings.rules, report=settings.report,
        )
        watched.start = end  # before the run: whatever happens, no row is judged twice
        try:
            return run_drift(options, now, watched.log).evidence
        except HafniumError as e:
            _LOG.error("%s: %s", target.name, e)
            return None

    def _enough(self, target: Target, watched: _Watched, end: datetime) -> bool:
        """Whether both arms have rows enough. What can't be read counts as enough: the run itself then says why it can't."""
        try:
            model = _manifest(watched, target.bundle)
            stable = None if target.stable_bundle is None else _manifest(watched, target.stable_bundle)
            wanted = [(model, candidate_arms(model[0], None if stable is None else stable[0]))]
            if stable is not None and not target.all_traffic:
                wanted.append((stable, STABLE_ARMS))
            for manifest, arms in wanted:
                if watched.log.count(Selection(*manifest, arms, watched.start, end)) < self._settings.rules.min_rows:
                    return False
        except HafniumError as e:
            _LOG.warning("%s: %s", target.name, e)
        return True


def _manifest(watched: _Watched, bundle: Path) -> tuple[str, str]:
    """Its digest and version. Raises BundleError when it can't be opened."""
    if bundle not in watched.manifests:
        manifest = open_bundle(bundle).manifest
        watched.manifests[bundle] = (manifest.digest, manifest.model_version)
    return watched.manifests[bundle]


def run_loop(loop: DriftLoop, stop: threading.Event, clock: Callable[[], datetime]) -> None:
    """Ticks until `stop` is set; a run in progress is finished first. One at a time: a slow run delays the next tick."""
    while not stop.is_set():
        for evidence in loop.tick(clock()):
            _LOG.info("%s %s: %s", evidence.model_digest[:15], evidence.verdict, evidence.message)
        stop.wait(loop.every_s)
