"""Which models a cluster's ModelRollouts say are under way, and since when: what a CronJob looks at, whatever is live this hour. Pure.

A candidate on its way is compared with the stable model in the same window; otherwise the stable model is watched on its own. Windows lie
on a grid of their own length, so those of successive runs touch and never overlap (each row counts once over all looks), and a run that
is repeated looks at the same window and finds its evidence written. A window begins later when traffic changed in between: the rollout
counts only windows that lie wholly after a step's weight took effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from hafnium_contract.errors import InputError

SETTLE = timedelta(minutes=2)
"""After a weight took effect: gateways follow a route, and the rollout waits for scrapes (strategy.scrapeLag), before anything counts."""
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class ModelPlace:
    """A model that serves: where its bundle lies, and the service whose log holds its rows."""

    service: str
    digest: str
    storage_uri: str


@dataclass(frozen=True)
class Watched:
    """One rollout's models. `stable` is what `model` is compared with; None: the model is watched on its own."""

    rollout: str
    model: ModelPlace
    stable: ModelPlace | None
    since: datetime | None
    """Since when traffic is as it is; None when nothing says so."""
    all_traffic: bool = False
    """The gateway gives `model` all requests: that `stable` has none is no gap."""


def watched(item: Mapping[str, Any]) -> Watched | None:
    """A ModelRollout as the API server gives it → what to watch; None when nothing of it serves yet. Raises InputError."""
    name = str(_mapping(item.get("metadata"), "metadata").get("name"))
    status = _mapping(item.get("status") or {}, f"ModelRollout {name}: status")
    stable = _model(status.get("stable"), f"ModelRollout {name}: status.stable")
    candidate = _model(status.get("candidate"), f"ModelRollout {name}: status.candidate")
    step = _mapping(status.get("step") or {}, f"ModelRollout {name}: status.step")
    since = _time(step.get("weightEffectiveSince"), f"ModelRollout {name}: status.step.weightEffectiveSince")
    climbing = bool(step) and status.get("phase") in ("Progressing", "Paused")
    if climbing and candidate is not None and stable is not None and candidate.digest != stable.digest:
        if since is None:
            return None  # the candidate has no traffic yet, so there is nothing to look at
        return Watched(name, candidate, stable, since + SETTLE, all_traffic=step.get("weightObserved") == 100)
    return None if stable is None else Watched(name, stable, None, None)


def window(now: datetime, length: timedelta, lag: timedelta, since: datetime | None) -> tuple[datetime, datetime] | None:
    """The last whole window of the grid that ended at least `lag` ago, cut at `since`; None when nothing is left of it."""
    end = _EPOCH + ((now - lag - _EPOCH) // length) * length
    start = end - length if since is None else max(end - length, since)
    return None if start >= end else (start, end)


def filled(template: str, namespace: str, rollout: str, service: str) -> str:
    """A log's place with {namespace}, {rollout} and {service} filled in, as the operator's --inference_log."""
    return template.replace("{namespace}", namespace).replace("{rollout}", rollout).replace("{service}", service)


def _model(data: Any, where: str) -> ModelPlace | None:
    found = _mapping(data or {}, where)
    service, digest, uri = (str(found.get(k) or "") for k in ("service", "digest", "storageUri"))
    if digest and not _DIGEST.fullmatch(digest):
        raise InputError(f"{where}.digest: {digest[:80]!r} is not sha256:<64 hex digits>")
    return ModelPlace(service, digest, uri) if service and digest and uri else None


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected an object, got {type(data).__name__}")
    return data


def _time(data: Any, where: str) -> datetime | None:
    if data is None:
        return None
    try:
        found = datetime.fromisoformat(str(data))
    except ValueError as e:
        raise InputError(f"{where}: {data!r} is not a time") from e
    if found.tzinfo is None:
        raise InputError(f"{where}: {data!r} has no zone")
    return found
