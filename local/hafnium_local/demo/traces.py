"""Files of a finished demo → what the report shows: each rollout's way, drift evidence, calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.evidence import EvidenceSpec, ModelEvidence, read_evidence
from hafnium_local.demo.plots import CalibrationCurve, DriftBar, GatePoint, RolloutTrace, WeightPoint
from hafnium_local.demo.report import DriftPanel
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.status import HistoryPoint, RolloutStatus

ENDS = ("Promoted", "RolledBack", "Paused")
"""Paused too: only a person goes on from there, and the demo has none."""


@dataclass(frozen=True)
class Ended:
    """How a candidate's rollout ended. `gates`: those that said Fail, or the reason when no gate did."""

    digest: str
    outcome: str
    reason: str
    message: str
    gates: list[str]


def read_status(state: Path, name: str) -> RolloutStatus | None:
    """The status of a ModelRollout, or None as long as there is none. Raises InputError when it is not readable as one."""
    path = state / "status" / f"ModelRollout-{name}.json"
    try:
        return RolloutStatus.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as e:
        raise InputError(f"{path}: not a rollout's status: {e}") from e


def ended(status: RolloutStatus, digest: str) -> Ended | None:
    """How the rollout of this candidate ended, or None while it is under way (or another one's)."""
    if status.candidate is None or status.candidate.digest != digest or status.phase not in ENDS:
        return None
    failed = [g.name for g in status.gates if g.verdict == "Fail"] if status.phase == "RolledBack" else []
    return Ended(digest, status.phase, status.reason, status.message, failed or [status.reason])


def run_points(history: Sequence[HistoryPoint]) -> list[list[HistoryPoint]]:
    """History cut into runs: each begins with a `Started` event."""
    runs: list[list[HistoryPoint]] = []
    for point in history:
        if point.event == "Started":
            runs.append([])
        if runs:
            runs[-1].append(point)
    return runs


def trace(version: str, points: Sequence[HistoryPoint], rollout: ModelRollout, found: Ended | None) -> RolloutTrace:
    """One run as the plots want it: a point where the weight changed, and each look of each gate."""
    weights: list[WeightPoint] = []
    gates: dict[str, list[GatePoint]] = {g.name: [] for g in rollout.spec.gates}
    for p in points:
        if not weights or (weights[-1].weight, weights[-1].shadow) != (p.weight, p.shadow):
            weights.append(WeightPoint(p.time, p.weight, p.shadow))
        for g in p.gates:
            gates.setdefault(g.name, []).append(GatePoint(p.time, g.lower, g.upper, g.verdict))
    margins = {g.name: g.margin for g in rollout.spec.gates if g.counted or g.kind == "scores"}
    outcome, reason = (found.outcome, found.message) if found is not None else ("not ended", "the rollout did not end")
    return RolloutTrace(version, outcome, reason, tuple(weights), {k: tuple(v) for k, v in gates.items()}, margins)


def drift_panels(evidence: Path, versions: dict[str, str]) -> tuple[DriftPanel, ...]:
    """The last finding with a verdict for each model: digest → version names the models in order."""
    last: dict[str, EvidenceSpec] = {}
    for found in read_evidence(evidence):
        if isinstance(found, ModelEvidence) and found.spec.kind == "drift" and found.spec.values:
            last[found.spec.model_digest] = found.spec
    return tuple(_panel(version, last[digest]) for digest, version in versions.items() if digest in last)


def _panel(version: str, spec: EvidenceSpec) -> DriftPanel:
    psi = [v for v in spec.values if v.statistic == "psi"]
    against_stable = [v for v in psi if v.compared_with == "stable"]
    chosen = against_stable or psi
    population = "the stable model's requests" if against_stable else "its reference"
    bars = tuple(DriftBar(v.name, v.value, v.threshold, v.drifted) for v in chosen)
    title = f"{version} against {population}, {spec.window_start:%H:%M:%S} to {spec.window_end:%H:%M:%S}, {spec.samples} rows"
    return DriftPanel(title, f"{version}: {spec.verdict}. {spec.message}", bars)


def calibration(version: str, bundle: Path) -> CalibrationCurve | None:
    """The calibration curve in a bundle's evaluation, or None when it has none."""
    data: Any = read_json(bundle / "evaluation.json")
    bins: Any = find_key(data, "curve")
    if not isinstance(bins, list) or not bins:
        return None
    return CalibrationCurve(version, tuple(float(b["score"]) for b in bins), tuple(float(b["observed"]) for b in bins))


def find_key(data: Any, name: str) -> Any:
    """The first value of this key at any depth of JSON data."""
    if isinstance(data, dict):
        if name in data:
            return data[name]
        return next((f for v in data.values() if (f := find_key(v, name)) is not None), None)
    return None


def read_json(path: Path) -> Any:
    """JSON of a file; raises InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: can't be read: {e}") from e


def story_of(path: Path) -> tuple[tuple[datetime, str], ...]:
    """Events of story.jsonl; a line cut off by a kill is left out."""
    out: list[tuple[datetime, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise HafniumError(f"{path}: can't be read: {e.strerror}") from e
    for line in lines:
        try:
            event = json.loads(line)
            out.append((datetime.fromisoformat(event["time"]), str(event["event"])))
        except (ValueError, KeyError):
            continue
    return tuple(out)
