"""Counters of both arms before and after → what each gate saw. The same for Envoy's counters and for the transformers' own. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hafnium_rollout.envoy_counters import ArmCounters
from hafnium_rollout.gate_spec import Gate
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


def latency_look(threshold_ms: float, arms: Arms) -> GateLook:
    """Requests above the threshold; between two buckets both are followed, so nothing is interpolated.

    Only a bucket that both arms have is followed: what an arm doesn't count is not known, and no zero.
    """
    for name, (before, after) in zip(_NAMES, arms, strict=True):
        if after.timed > before.timed and not after.not_slower:
            return GateLook(error=f"the {name} arm has {after.timed - before.timed} timed requests and no histogram bucket that all of its "
                                  "pods have, so it isn't known how many were slow")
    shown = [sorted(after.not_slower) for _, after in arms if after.not_slower]
    if not shown:  # no request yet: that is known, and it is about no threshold in particular
        return GateLook((Series(Counts(0, 0), Counts(0, 0)),))
    common = sorted(set(shown[0]).intersection(*shown))
    own = [thresholds(threshold_ms, bounds) for bounds in shown]
    chosen = thresholds(threshold_ms, common)
    if () in own:
        largest = min(bounds[-1] for bounds in shown)
        return GateLook(error=f"slowerThan {threshold_ms:g} ms is above the gateway's largest bucket ({largest:g} ms)")
    if chosen not in own:  # coarser than what either arm can tell: nearly everything, or nothing, may lie above such buckets in both
        has = ", ".join(f"the {name} arm has {' and '.join(f'{b:g}' for b in bounds)} ms" for name, bounds in zip(_NAMES, own, strict=True))
        return GateLook(error=f"slowerThan {threshold_ms:g} ms can't be compared, the arms' nearest buckets differ: {has}; choose one that "
                              "is a bucket of both")
    series: list[Series] = []
    for bound in chosen:
        stable, candidate = (_slower(bound, before, after) for before, after in arms)
        series.append(Series(stable, candidate, f"> {bound:g} ms"))
    return GateLook(tuple(series))


_NAMES = ("stable", "candidate")


def _slower(bound: float, before: ArmCounters, after: ArmCounters) -> Counts:
    """Slow requests of one arm; one without requests may not show the bucket yet."""
    total = after.timed - before.timed
    below = after.not_slower.get(bound, 0) - before.not_slower.get(bound, 0)
    return Counts(min(max(total - below, 0), total), total)


def thresholds(threshold_ms: float, bounds: Sequence[float]) -> tuple[float, ...]:
    """The bucket bound itself, or the two around the threshold; none above the last bound."""
    for bound in bounds:
        if abs(bound - threshold_ms) <= 1e-6 * bound:
            return (bound,)
    above = [b for b in bounds if b > threshold_ms]
    below = [b for b in bounds if b < threshold_ms]
    return (*below[-1:], *above[:1]) if above else ()
