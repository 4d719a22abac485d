"""Counters of both arms before and after → what each gate saw. The same for Envoy's counters and for the transformers' own. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hafnium_rollout.envoy_counters import ArmCounters
from hafnium_rollout.objects import Gate
from hafnium_rollout.observation import Counts, GateLook, Series

Arms = tuple[tuple[ArmCounters, ArmCounters], tuple[ArmCounters, ArmCounters]]
"""(before, after) of the stable arm, then of the candidate's."""
_MS = 1000.0


def gate_look(gate: Gate, arms: Arms, differences: tuple[float, ...] = (), scores_error: str = "") -> GateLook:
    """What a gate over our own counters saw."""
    if gate.kind == "scores":
        stable, candidate = (Counts(0, after.completed - before.completed) for before, after in arms)
        return GateLook(series=(Series(stable, candidate),), differences=differences, error=scores_error)
    if gate.latency is not None:
        return latency_look(gate.latency.slower_than.total_seconds() * _MS, arms)
    if gate.kind == "requests":
        stable, candidate = (_bad_requests(before, after) for before, after in arms)
        return GateLook((Series(stable, candidate),))
    return GateLook()


def _bad_requests(before: ArmCounters, after: ArmCounters) -> Counts:
    """Failed and refused ones. The two counters are read one after the other, so the sum is held below the total."""
    total = after.error - before.error + after.success - before.success
    return Counts(min(after.error - before.error + after.refused - before.refused, total), total)


def latency_look(threshold_ms: float, arms: tuple[tuple[ArmCounters, ArmCounters], ...]) -> GateLook:
    """Requests above the threshold; between two buckets both are followed, so nothing is interpolated."""
    bounds = sorted({b for _, after in arms for b in after.not_slower})
    if not bounds:
        return GateLook((Series(Counts(0, 0), Counts(0, 0)),) * len(thresholds(threshold_ms, _DEFAULT_BOUNDS_MS)))
    chosen = thresholds(threshold_ms, bounds)
    if not chosen:
        return GateLook(error=f"slowerThan {threshold_ms:g} ms is above the gateway's largest bucket ({bounds[-1]:g} ms)")
    series: list[Series] = []
    for bound in chosen:
        counts: list[Counts] = []
        for before, after in arms:
            total = after.timed - before.timed
            below = after.not_slower.get(bound, 0) - before.not_slower.get(bound, 0)
            counts.append(Counts(min(max(total - below, 0), total), total))
        series.append(Series(counts[0], counts[1], f"> {bound:g} ms"))
    return GateLook(tuple(series))


_DEFAULT_BOUNDS_MS = (0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
"""Envoy's own; only asked before the first request, when it shows no bucket yet."""


def thresholds(threshold_ms: float, bounds: Sequence[float]) -> tuple[float, ...]:
    """The bucket bound itself, or the two around the threshold; none above the last bound."""
    for bound in bounds:
        if abs(bound - threshold_ms) <= 1e-6 * bound:
            return (bound,)
    above = [b for b in bounds if b > threshold_ms]
    below = [b for b in bounds if b < threshold_ms]
    return (*below[-1:], *above[:1]) if above else ()
