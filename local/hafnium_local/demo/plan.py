"""What a demo will do, decided before it starts: folders, moments in time, pace, fault. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_local.manifest_writer import Fault, Pace

FaultKind = Literal["units", "stale", "slow", "crash"]
FAULTS: tuple[FaultKind, ...] = ("units", "stale", "slow", "crash")

PACE = Pace(
    shadow_samples=1000, shadow_deadline="3m",
    weights=((5, "3s", 100, "4m"), (25, "3s", 200, "4m")), bake="5s",
    margin=0.05, alpha=0.01, score_shift=0.05, slower_than="500ms", blind="60s",
    drift_waited_for=("shadow",),
)
"""A rollout in a minute instead of four days. A wider margin needs fewer requests: at 5 % of 100 requests/s there are 5 a second.
Slow means 500 ms here, not the owners' 100 ms: two cores also train, watch and make the load. At 5 % a drift window takes half a
minute, so only the shadow step waits for one; one that fails counts at every step."""

PACE_FILE = replace(PACE, drift_waited_for=())
"""For a file of the user's own. Its last 30 % may well differ from what came before (the ULB file's two days do, in half of the
features), and then both arms drift in every window: the world changed, and a step that waits for a clean window waits for ever.
So no step waits; a candidate that drifts from the *stable* model in the same window still goes back."""
SHARE_V1, SHARE_V2 = 0.75, 0.9
"""Simulated days known to v1 and v2, as shares of all; what follows is replayed."""
SHARE_V1_FILE, SHARE_V2_FILE = 0.5, 0.7
"""The same for a file of the user's own: its last 30 % stay untouched until the end."""
STALE_BY = timedelta(days=20)
SLOW_MS = 700
CRASH_AFTER = 60
"""Requests that a crashing candidate answers before it dies."""
CENTS = 100


@dataclass(frozen=True)
class Cutoffs:
    """Until when each version's labels and events are known, and from when traffic is replayed."""

    v1: datetime
    v2: datetime
    replay_from: datetime
    replay_until: datetime


@dataclass(frozen=True)
class DemoOptions:
    """What the user asked for."""

    work: Path
    contract: Path
    data: Path | None
    fault: FaultKind
    days: int = 60
    seed: int = 7
    trials: int = 3
    rate_per_s: float = 100.0
    port: int | None = None

    def as_json(self) -> dict[str, Any]:
        """What decides about the demo; the port does not."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items() if k not in ("port", "work")}


@dataclass(frozen=True)
class Folders:
    """Where everything of one demo lies."""

    work: Path

    @property
    def simulated(self) -> Path:
        return self.work / "simulated"

    @property
    def features(self) -> Path:
        return self.work / "features"

    @property
    def stale_features(self) -> Path:
        return self.work / "features-stale"

    @property
    def training_table(self) -> Path:
        return self.work / "training.parquet"

    @property
    def tracking(self) -> Path:
        return self.work / "mlflow"

    @property
    def state(self) -> Path:
        return self.work / "state"

    @property
    def requests(self) -> Path:
        return self.work / "requests.jsonl"

    @property
    def journal(self) -> Path:
        return self.work / "replay-journal.txt"

    @property
    def replay_summary(self) -> Path:
        return self.work / "replay-summary.json"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def report(self) -> Path:
        return self.work / "report.html"

    @property
    def story(self) -> Path:
        return self.work / "story.jsonl"

    def bundle(self, version: str) -> Path:
        return self.work / "bundles" / version

    def manifest(self, version: str) -> Path:
        return self.work / "manifests" / f"{version}.yaml"


def cutoffs(
    first: datetime, last: datetime, quantiles: dict[float, datetime], *, simulated: bool, age_max: timedelta | None
) -> Cutoffs:
    """Simulated data is cut by days, a file by its rows' times (`quantiles`: share of rows → event time).

    `age_max`: how old looked-up values may become. The online store is filled once, as of the replay's beginning, so later
    transactions than that would find its values too old; None without views.
    """
    if simulated:
        span = last - first
        v1, v2 = (_midnight(first + span * share) for share in (SHARE_V1, SHARE_V2))
    else:
        v1, v2 = quantiles[SHARE_V1_FILE], quantiles[SHARE_V2_FILE]
    if not first < v1 < v2 < last:
        raise InputError(
            f"the data's event times run from {first} to {last}: too short to train twice and replay the rest; give more rows"
        )
    until = last + timedelta(microseconds=1)
    return Cutoffs(v1, v2, v2, until if age_max is None else min(until, v2 + age_max))


def age_max(contract: ModelContract) -> timedelta | None:
    """The shortest maximum age of any looked-up value."""
    ages = [f.max_age or contract.view(f.source.view).max_age for f in contract.features if isinstance(f.source, FromView)]
    return min(ages, default=None)


def _midnight(when: datetime) -> datetime:
    return when.replace(hour=0, minute=0, second=0, microsecond=0)


def money_fields(contract: ModelContract) -> list[str]:
    """What the units fault hits: request fields in a currency, or, where there is none, numbers that pass validation out of their
    range, or, where there is none either, all numbers (the candidate then refuses what the stable model accepts)."""
    numbers = [
        (field, f) for field, f in contract.request_fields.items()
        if f.dtype in ("float", "int")
    ]
    passing = [(field, f) for field, f in numbers if f.out_of_range == "clamp"]
    money = [(field, f) for field, f in numbers if f.is_money]
    return [field for field, _ in money or passing or numbers]


def fault_of(kind: FaultKind, contract: ModelContract) -> Fault | None:
    """The proxy in front of v3, or None when the fault is in its feature store (stale, where the contract has views)."""
    options: dict[str, Any]
    match kind:
        case "units":
            fields = money_fields(contract)
            if not fields:
                raise InputError(f"contract {contract.name}: no request field is a number, so no unit is wrong; try --fault slow")
            options = {"features": fields, "factor": CENTS}
        case "stale":
            if contract.views:
                return None
            options = {}
        case "slow":
            options = {"delayMs": SLOW_MS}
        case "crash":
            options = {"crashAfter": CRASH_AFTER}
    return Fault(kind, options)


EXPECTED_GATES: dict[FaultKind, tuple[str, ...]] = {
    "units": ("drift", "scores", "errors"), "stale": ("drift", "scores"), "slow": ("latency",),
    "crash": ("errors", "CrashLoop", "CandidateUnavailable"),
}
"""Gates (or reasons) that rightly reject each fault. Another one is a wrong answer, even when the candidate was rejected."""
