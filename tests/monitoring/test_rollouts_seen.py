"""Which models and which windows a CronJob looks at."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from hafnium_contract.errors import InputError
from hafnium_monitoring.rollouts_seen import SETTLE, filled, watched, window

HOUR = timedelta(hours=1)
NOW = datetime(2026, 1, 15, 13, 2, tzinfo=UTC)
STABLE = {"service": "risk-1", "digest": "sha256:" + "a" * 64, "storageUri": "pvc://bundles/v1"}
CANDIDATE = {"service": "risk-2", "digest": "sha256:" + "b" * 64, "storageUri": "pvc://bundles/v2"}


def rollout(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "risk"}, "status": status}


def test_a_candidate_on_its_way_is_compared_with_the_stable_model_since_its_weight_took_effect() -> None:
    for phase in ("Progressing", "Paused"):
        seen = watched(rollout(
            phase=phase, stable=STABLE, candidate=CANDIDATE, step={"index": 0, "weightEffectiveSince": "2026-01-15T12:20:00Z"}))
        assert seen is not None
        assert seen.stable is not None
        assert (seen.model.service, seen.stable.service) == ("risk-2", "risk-1")
        assert seen.since == datetime(2026, 1, 15, 12, 20, tzinfo=UTC) + SETTLE


@pytest.mark.parametrize(("weight", "everything"), [(100, True), (25, False), (None, False)])
def test_at_weight_100_the_stable_model_is_not_expected_to_have_rows(weight: int | None, everything: bool) -> None:
    seen = watched(rollout(phase="Progressing", stable=STABLE, candidate=CANDIDATE, step={
        "index": 3, "weightObserved": weight, "weightEffectiveSince": "2026-01-15T12:20:00Z"}))
    assert seen is not None
    assert seen.all_traffic is everything


@pytest.mark.parametrize("phase", ["Promoted", "RolledBack", "Pending"])
def test_without_a_climb_the_stable_model_is_watched_on_its_own(phase: str) -> None:
    seen = watched(rollout(phase=phase, stable=STABLE, candidate=CANDIDATE))
    assert seen is not None
    assert (seen.model.service, seen.stable, seen.since) == ("risk-1", None, None)


@pytest.mark.parametrize("status", [
    {}, {"phase": "Pending"}, {"phase": "Progressing", "stable": STABLE, "candidate": CANDIDATE, "step": {"index": 0}},
    {"phase": "Promoted", "stable": {"service": "risk-1"}},
])
def test_what_does_not_serve_yet_is_not_looked_at(status: dict[str, Any]) -> None:
    assert watched(rollout(**status)) is None


@pytest.mark.parametrize("status", [
    {"stable": [1]}, {"phase": "Progressing", "stable": STABLE, "candidate": CANDIDATE, "step": {"weightEffectiveSince": "soon"}},
    {"phase": "Progressing", "stable": STABLE, "candidate": CANDIDATE, "step": {"weightEffectiveSince": "2026-01-15T12:20:00"}},
])
def test_a_status_of_another_form_is_named(status: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="ModelRollout risk: status"):
        watched(rollout(**status))


def test_windows_of_successive_runs_touch_and_never_overlap() -> None:
    found = [window(NOW + i * HOUR, HOUR, timedelta(seconds=30), None) for i in range(3)]
    assert found[0] == (datetime(2026, 1, 15, 12, tzinfo=UTC), datetime(2026, 1, 15, 13, tzinfo=UTC))
    for before, after in itertools.pairwise(found):
        assert before is not None
        assert after is not None
        assert before[1] == after[0]


def test_a_run_that_is_repeated_looks_at_the_same_window() -> None:
    assert window(NOW, HOUR, timedelta(0), None) == window(NOW + timedelta(minutes=50), HOUR, timedelta(0), None)


def test_a_window_ends_when_its_rows_are_in_the_log() -> None:
    assert window(datetime(2026, 1, 15, 13, 0, 10, tzinfo=UTC), HOUR, timedelta(seconds=30), None) == (
        datetime(2026, 1, 15, 11, tzinfo=UTC), datetime(2026, 1, 15, 12, tzinfo=UTC))


def test_a_window_never_holds_traffic_of_before_the_step() -> None:
    since = datetime(2026, 1, 15, 12, 22, tzinfo=UTC)
    assert window(NOW, HOUR, timedelta(0), since) == (since, datetime(2026, 1, 15, 13, tzinfo=UTC))
    assert window(NOW, HOUR, timedelta(0), datetime(2026, 1, 15, 13, 1, tzinfo=UTC)) is None


def test_places_of_logs_are_filled_in() -> None:
    assert filled("s3://b/{namespace}/{rollout}/{service}", "n", "r", "s") == "s3://b/n/r/s"
    assert filled("/mnt/inference-log", "n", "r", "s") == "/mnt/inference-log"
