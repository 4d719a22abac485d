"""What is simulated: each study is a list of independent tasks with seeds of their own, so any number of processes gives the same."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import climb
import findings
import gate_runs
import numpy as np
import paths
import rivals
import worlds
from rich.progress import Progress
from worlds import Floats, Ints

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.planning import plan_rollout

PHIS = 40
"""Operators per world: each measured φ on a week of their own; rollouts take turns."""
CHUNK = 4
BLOCK = 50
PLAN_SHARE = 5
"""Medians need fewer rollouts than rare events."""
SHADOW = 10
BAKED = 10
"""Every so many false-rollback runs go on through the hour at weight 100, where only the hard limit and drift can still fail."""
ERRORS_MARGIN = SLOW_MARGIN = climb.PACE.margin
SCORE_MARGIN = climb.PACE.score_shift


@dataclass(frozen=True)
class Case:
    """One row: a world, a harm, and how the rollout is set up."""

    name: str
    world: str = "constant"
    harm: worlds.Harm = field(default_factory=worlds.Harm)
    shadow: bool = True
    person_skips: bool = False


AA = tuple(Case(f"climb {w}", w, person_skips=True) for w in worlds.WORLDS)
PLAIN_WORLDS = ("constant", "retries", "noise")
"""Where the sample is also tried without a measured dispersion."""


def _bad(times: int) -> tuple[Case, ...]:
    live = {"live_only": True}
    return (
        Case(f"errors ×{times}", harm=worlds.Harm(errors=times * ERRORS_MARGIN)),
        Case(f"errors ×{times}, live only", harm=worlds.Harm(errors=times * ERRORS_MARGIN, **live)),
        Case(f"slow ×{times}, live only", harm=worlds.Harm(slow=times * SLOW_MARGIN, **live)),
        Case(f"scores ×{times}", harm=worlds.Harm(score=times * SCORE_MARGIN)),
    )


BAD = (*_bad(2), Case("errors ×2 among retries, live only", "retries", worlds.Harm(errors=2 * ERRORS_MARGIN, live_only=True)),
       Case("drift PSI .25", harm=worlds.Harm(drift=0.25)))
AT_MARGIN = _bad(1)
LATE_LOOK = 120
DELAYS = (
    Case("+0.5 pt", harm=worlds.Harm(errors=0.005), shadow=False),
    Case("+1 pt", harm=worlds.Harm(errors=0.01), shadow=False),
    Case("+2 pt", harm=worlds.Harm(errors=0.02), shadow=False),
    Case("p99 × 1.1", harm=worlds.Harm(latency=1.1), shadow=False),
    Case("p99 × 1.3", harm=worlds.Harm(latency=1.3), shadow=False),
    Case("+1 pt after 60 min", harm=worlds.Harm(errors=0.01, from_look=LATE_LOOK), shadow=False),
)
ACROSS = (("Fail", 0.0), ("Pass", 0.05), ("Pass", 0.0), ("Fail", 0.05), ("Fail", 0.1))
"""Verdict and shift: the first two are wrong, at alpha .004 and .01."""
SCORES = (("0.02", 0.02), ("0.05", 0.05))


def _seed(seed: int, name: str, index: int) -> tuple[int, ...]:
    return (seed, *name.encode(), index)


def settle() -> None:
    """For each process of the pool: what a rollout leaves behind has no cycles, so it need not be searched for them all the time."""
    gc.freeze()
    gc.set_threshold(200_000, 50, 50)


def _run(case: Case, seed: int, phis: tuple[tuple[climb.Phi, climb.Phi], ...], indexes: tuple[int, ...]) -> list[climb.Ending]:
    return [
        climb.Climb(
            case.world, _seed(seed, case.name, i), case.harm, phis[i % len(phis)], shadow=case.shadow, drift=case.shadow,
            person_skips=case.person_skips,
        ).run(to_end=not case.person_skips or i % BAKED == 0)
        for i in indexes
    ]


def _phi(world: str, seed: int, index: int) -> tuple[climb.Phi, climb.Phi]:
    return climb.measure_phi(world, np.random.default_rng(np.random.SeedSequence(_seed(seed, f"phi {world}", index))))


def _passes(shadow: bool, weight: int, base: float, seed: int, index: int) -> float:
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, f"pass {shadow} {weight} {base}", index)))
    share = 0.5 if shadow else weight / 100
    return gate_runs.until(_gate("errors"), "Pass", gate_runs.counted(rng, share, 100, base, base), weight=weight, shadow=shadow,
                           alpha_fail=1e-12, units_max=200_000)


def _fails(weight: int, base: float, harm: float, seed: int, index: int) -> float:
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, f"fail {weight} {base} {harm}", index)))
    return gate_runs.until(_gate("errors"), "Fail", gate_runs.counted(rng, weight / 100, 40, base + harm, base), weight=weight,
                           shadow=False, alpha_fail=_alpha("errors"), units_max=200_000)


def _shift(shift: float, seed: int, index: int) -> float:
    gate = Gate.model_validate({"name": "scores", "scores": {}, "compare": {"margin": 0.02, "harmless": 0.0}})
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, f"scores {shift}", index)))
    return gate_runs.until(gate, "Fail", gate_runs.pairs(rng, shift), weight=0, shadow=True, alpha_fail=_alpha("scores"), units_max=20_000)


def _across(wanted: str, shift: float, seed: int, index: int) -> float:
    """Candidate scores until the verdict, compared across arms at 5 %, margin .05; inf when four hours of looks don't bring it."""
    gate = Gate.model_validate({"name": "scores", "scores": {"unpaired": True}, "compare": {"margin": 0.05, "harmless": 0.0}})
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, f"across {wanted} {shift}", index)))
    return gate_runs.until(gate, wanted, gate_runs.arms(rng, shift), weight=5, shadow=False, alpha_fail=_alpha("errors"),
                           units_max=rivals.LOOKS * worlds.REQUESTS // 20)


def _gate(name: str) -> Gate:
    return next(g for g in climb.sample(None, None).spec.gates if g.name == name)


def _alpha(name: str) -> float:
    return alphas_of(_gate(name), alpha_parts(climb.sample(None, None).spec))[0]


def _counted(world: str, harm: worlds.Harm, shadow: int, phis: tuple[tuple[climb.Phi, climb.Phi], ...] | None, seed: int,
             part: tuple[int, int]) -> tuple[Ints, Floats]:
    """Look of the first Fail of the counted gates for rollouts part[0] … part[1], and candidate requests (minutes, for late harm)."""
    first, last = part
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, f"paths {world} {harm} {shadow} {phis is None}", first)))
    drawn = rivals.draw(world, rng, last - first, harm, shadow)
    phi = None if phis is None else [phis[i % len(phis)] for i in range(first, last)]
    looks = paths.evidence(drawn, climb.sample(None, None).spec, phi).fails_at()
    return looks, rivals.delay(drawn, looks, harm.from_look)


def _score_false(seed: int, index: int) -> bool:
    """Does the scores gate fail an equal candidate within the pairs of its shadow step?"""
    rng = np.random.default_rng(np.random.SeedSequence(_seed(seed, "scores aa", index)))
    found = gate_runs.until(_gate("scores"), "Fail", gate_runs.pairs(rng, 0.0, worlds.REQUESTS), weight=0, shadow=True,
                            alpha_fail=_alpha("scores"), units_max=SHADOW * worlds.REQUESTS)
    return bool(np.isfinite(found))


def _drift_false(world: str, seed: int, index: int) -> bool:
    """Does the drift job fail an equal candidate in any window of a rollout: two at 5 %, two at 25 %, one at 100 %?"""
    drift = findings.Drift(np.random.default_rng(np.random.SeedSequence(_seed(seed, f"drift {world}", index))), world, 0.0)
    total = worlds.REQUESTS * climb.DRIFT_LOOKS
    rows = [round(total * w) for w in (0.05, 0.05, 0.25, 0.25, 1.0)]
    return any(drift.window(n, total - n).verdict == "Fail" for n in rows)


class Laboratory:
    """Runs studies on a pool of processes, with a bar for each."""

    def __init__(self, pool: ProcessPoolExecutor, bars: Progress, rollouts: int, seed: int) -> None:
        self.pool, self.bars, self.rollouts, self.seed = pool, bars, rollouts, seed
        self.others: dict[str, list[bool]] = {}
        self.phis: dict[str, tuple[tuple[climb.Phi, climb.Phi], ...]] = {}

    def _map(self, name: str, function: Any, items: list[Any]) -> list[Any]:
        bar = self.bars.add_task(name, total=len(items))
        out: list[Any] = []
        for found in self.pool.map(function, items):
            out.append(found)
            self.bars.advance(bar)
        return out

    def phi(self, world: str) -> tuple[tuple[climb.Phi, climb.Phi], ...]:
        """Dispersion as measured by the operators of a world."""
        world = world if world in ("wave", "retries", "noise") else "constant"  # before an incident or a step nothing is seen of it
        if world not in self.phis:
            self.phis[world] = tuple(self._map(f"φ in {world}", partial(_phi, world, self.seed), list(range(PHIS))))
        return self.phis[world]

    def run(self, case: Case, climbs: int) -> list[climb.Ending]:
        """So many rollouts of a case."""
        chunks = [tuple(range(i, min(i + CHUNK, climbs))) for i in range(0, climbs, CHUNK)]
        phis = self.phi(case.world)
        return [e for part in self._map(case.name, partial(_run, case, self.seed, phis), chunks) for e in part]

    def counted(self, name: str, world: str, harm: worlds.Harm, *, shadow: int, with_phi: bool) -> tuple[Ints, Floats]:
        """The counted gates over many rollouts: look of the first Fail, and candidate requests (minutes for late harm) until then."""
        parts = [(i, min(i + BLOCK, self.rollouts)) for i in range(0, self.rollouts, BLOCK)]
        phis = self.phi(world) if with_phi else None
        found = self._map(name, partial(_counted, world, harm, shadow, phis, self.seed), parts)
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def false_otherwise(self, world: str) -> tuple[list[bool], list[bool]]:
        """Rollouts that the scores gate, and that the drift job fails. Traffic's ups and downs don't touch them, so worlds share them."""
        every = list(range(self.rollouts))
        kind = "moved" if world in findings.MOVED else "still"
        if "scores" not in self.others:
            self.others["scores"] = self._map("scores of equal models", partial(_score_false, self.seed), every)
        if kind not in self.others:
            self.others[kind] = self._map(f"drift of equal models, {kind}", partial(_drift_false, world, self.seed), every)
        return self.others["scores"], self.others[kind]

    def plan(self) -> list[tuple[str, float, float]]:
        """(what, planned, simulated) medians in candidate requests, for the sample without dispersion."""
        some = list(range(max(self.rollouts // PLAN_SHARE, 20)))
        out: list[tuple[str, float, float]] = []
        rollout = climb.sample(None, None)
        for base in (0.002, 0.01):
            rows = [r for r in plan_rollout(rollout, rate=worlds.RATE, base=base, regression=0.01) if r.gate == "errors"]
            for row in rows:
                if row.pass_requests is None:
                    raise ValueError(f"the plan says that an equal candidate doesn't pass: {row}")
                found = self._map(f"Pass at {_where(row.weight, row.shadow)}, base {base:.1%}",
                                  partial(_passes, row.shadow, row.weight, base, self.seed), some)
                out.append((f"Pass, {_where(row.weight, row.shadow)}, base {base:.1%}", row.pass_requests, float(np.median(found))))
        for weight, harm in ((5, 0.005), (5, 0.01), (5, 0.02), (25, 0.01)):
            rows = plan_rollout(rollout, rate=worlds.RATE, base=worlds.BASE, regression=harm)
            row = next(r for r in rows if r.gate == "errors" and r.weight == weight and not r.shadow)
            planned = (row.fail_s or float("inf")) * worlds.RATE * weight / 100
            found = self._map(f"Fail at {weight} %, +{100 * harm:g} pt", partial(_fails, weight, worlds.BASE, harm, self.seed), some)
            out.append((f"Fail, {weight} %, +{100 * harm:g} pt", planned, float(np.median(found))))
        return out

    def shifts(self) -> dict[str, list[float]]:
        """Pairs until Fail for a shift of the mean score."""
        some = list(range(max(self.rollouts // PLAN_SHARE, 20)))
        return {name: self._map(f"scores shifted by {name}", partial(_shift, s, self.seed), some) for name, s in SCORES}

    def across(self) -> dict[str, list[float]]:
        """Scores compared across arms: candidate scores until the verdict, inf for never."""
        some = list(range(max(self.rollouts // 2 // PLAN_SHARE, 20)))
        return {
            f"{verdict} at a shift of {shift:g}": self._map(f"across arms, {verdict} at {shift:g}",
                                                             partial(_across, verdict, shift, self.seed), some)
            for verdict, shift in ACROSS
        }


def _where(weight: int, shadow: bool) -> str:
    return "shadow" if shadow else f"{weight} %"
