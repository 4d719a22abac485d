"""The rules that others decide by, on the same traffic: Argo Rollouts, Flagger, a z-test at each look, Mann-Whitney as in Kayenta.

- Argo Rollouts: a measurement is failed when its value breaks the condition; the analysis fails when *more than* failureLimit
  measurements failed, counted per metric and over the whole run. Customary: error rate ≤ 5 % over 5 minutes,
  every 5 minutes, limit 3.
- Flagger: each minute every metric is checked over the last minute; a minute with any failed one is a failed check, and at
  `threshold` failed checks (counted over the whole run) it goes back. Customary: success ≥ 99 %, p99 ≤ 500 ms, threshold 5.
- Kayenta's judge: Mann-Whitney on the points of both arms; "High" when the lower end of the 98 % interval of the shift lies
  above a quarter of the Hodges-Lehmann estimate. Here: one point a minute, the last 30 minutes, every 30 minutes.

- k measurements in a row above a fixed threshold: neither tool counts so for bad values, but people write it into queries.

"Tuned" rules have the threshold that gives 10 false rollbacks per 1,000 at a constant base, over both of their metrics together. It is
found on paths of the constant world itself: they know the base rate and its noise, which no one does in production.

- Wald's sequential probability ratio test, told the base rate and the harm, with all of the 10 per 1,000 for errors alone. No rule
  for a canary, but the yardstick for what any rule can reach: of all with that error rate it needs the fewest requests on average (Wald and
  Wolfowitz 1948; Chow, Robbins and Siegmund 1971 for tests that end on one side only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import worlds
from worlds import Floats, Ints

STEP = 240
LOOKS = 2 * STEP
NEVER = 10**6
GOAL = 0.01
_WINDOW = 60
_POINTS = 30
_TUNE_CHUNK = 500
TUNING_STEPS = 8
"""Times that `Rivals` says it has come further."""
_CUSTOMARY_ARGO = (0.05, 500.0)
_CUSTOMARY_FLAGGER = (0.01, 500.0)
_KAYENTA_98 = 292
"""Of 900 differences of 30 and 30 points, the lower end of the 98 % interval is the 293rd: 450 − 2.326·√(30·30·61/12)."""


@dataclass(frozen=True)
class Paths:
    """Counts of many rollouts, [rollout, look]: half of the looks at 5 %, half at 25 %."""

    bad_c: Ints
    total_c: Ints
    bad_s: Ints
    total_s: Ints
    asked_c: Ints
    """Client requests, without retries."""
    asked_s: Ints
    slow_c: Ints
    slow_s: Ints

    @property
    def requests(self) -> Ints:
        return self.asked_c


def draw(world: str, rng: np.random.Generator, rollouts: int, harm: worlds.Harm, shadow: int = 0) -> Paths:
    """Traffic of the live steps, after `shadow` looks in which both arms answer all requests."""
    shape = (rollouts, shadow + LOOKS)
    arms = worlds.arms(world, rng, shape, shadow + STEP, harm)
    weight = np.where(np.arange(shape[1]) < shadow + STEP, 0.05, 0.25)
    nc = rng.binomial(worlds.REQUESTS, weight, shape)
    ns = worlds.REQUESTS - nc
    nc[:, :shadow] = ns[:, :shadow] = worlds.REQUESTS
    cb, ct = worlds.bad_counts(world, rng, nc, arms.bad_candidate)
    sb, st = worlds.bad_counts(world, rng, ns, arms.bad_stable)
    return Paths(cb, ct, sb, st, nc, ns, worlds.slow_counts(rng, nc, arms.late_candidate, harm.slow),
                 worlds.slow_counts(rng, ns, arms.late_stable))


def _summed(counts: Ints, window: int, every: int) -> Ints:
    """Sums over the last `window` looks (at the beginning: those there are), at every `every`-th look, [rollout, measurement, …]."""
    total = np.cumsum(counts, axis=1)
    before = np.zeros_like(total)
    before[:, window:] = total[:, :-window]
    return (total - before)[:, every - 1::every]


def _ratio(bad: Ints, total: Ints) -> Floats:
    return bad / np.maximum(total, 1)


@dataclass(frozen=True)
class Counting:
    """A rule that counts measurements above fixed thresholds. `fails` of them end the rollout."""

    name: str
    window: int
    every: int
    fails: int
    together: bool = False
    """Failed checks of all metrics count together (Flagger), not metric by metric (Argo Rollouts)."""
    consecutive: bool = False
    """Only failures in a row count."""

    def values(self, paths: Paths) -> tuple[Floats, Floats]:
        """Error share and p99 of the candidate at each measurement."""
        w, e = self.window, self.every
        asked = _summed(paths.asked_c, w, e)
        errors = _ratio(_summed(paths.bad_c, w, e), _summed(paths.total_c, w, e))
        return errors, worlds.p99(asked, _summed(paths.slow_c, w, e))

    def tune(self, drawn: Sequence[Paths]) -> tuple[float, float]:
        """Thresholds at the same quantile of both metrics' measurements, so that 10 of 1,000 rollouts go back over both together."""
        errors_and_slow = [self.values(p) for p in drawn]
        values = tuple(np.concatenate([v[i] for v in errors_and_slow]) for i in (0, 1))
        low, high = 0.5, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            thresholds = tuple(float(np.quantile(v, middle)) for v in values)
            found = self._first(values, thresholds)
            low, high = (middle, high) if float(np.mean(found < NEVER)) > GOAL else (low, middle)
        errors, slow = (float(np.quantile(v, high)) for v in values)
        return errors, slow

    def fails_at(self, paths: Paths, thresholds: tuple[float, float]) -> Ints:
        """Look of the rollback per rollout; NEVER if there is none."""
        return self._first(self.values(paths), thresholds)

    def _first(self, values: tuple[Floats, ...], thresholds: tuple[float, ...]) -> Ints:
        bad = [v > t for v, t in zip(values, thresholds, strict=True)]
        counts = [self._count(bad[0] | bad[1])] if self.together else [self._count(b) for b in bad]
        failed = np.any([c >= self.fails for c in counts], axis=0)
        return np.where(failed.any(axis=1), (np.argmax(failed, axis=1) + 1) * self.every - 1, NEVER)

    def _count(self, bad: np.ndarray) -> Ints:
        total = np.cumsum(bad, axis=1)
        if not self.consecutive:
            return total
        return total - np.maximum.accumulate(np.where(bad, 0, total), axis=1)


def _z(kc: Floats, nc: Floats, ks: Floats, ns: Floats) -> Floats:
    pooled = (kc + ks) / np.maximum(nc + ns, 1)
    sd = np.sqrt(np.maximum(pooled * (1 - pooled), 1e-12) * (1 / np.maximum(nc, 1) + 1 / np.maximum(ns, 1)))
    return (_ratio(kc, nc) - _ratio(ks, ns)) / sd


def _tuned(statistics: Sequence[Floats]) -> float:
    """What the largest of a rollout's values exceeds in 10 of 1,000 rollouts; each array is [rollout, look]."""
    return float(np.quantile(np.concatenate([s.max(axis=1) for s in statistics]), 1.0 - GOAL, method="higher"))


class ZTest:
    """Pooled two-proportion z-test on everything so far, at each look, one-sided; errors and both histogram bounds around p99."""

    name = "z-test at each look"

    def statistic(self, paths: Paths) -> Floats:
        def cumulated(counts: Ints) -> Floats:
            return np.cumsum(counts, axis=1).astype(np.float64)

        found = [_z(*(cumulated(x) for x in (paths.bad_c, paths.total_c, paths.bad_s, paths.total_s)))]
        nc, ns = cumulated(paths.asked_c), cumulated(paths.asked_s)
        found += [_z(cumulated(paths.slow_c[..., i]), nc, cumulated(paths.slow_s[..., i]), ns) for i in (1, 2)]
        return np.max(found, axis=0)

    def tune(self, drawn: Sequence[Paths]) -> float:
        return _tuned([self.statistic(p) for p in drawn])

    def fails_at(self, paths: Paths, threshold: float) -> Ints:
        failed = self.statistic(paths) > threshold
        return np.where(failed.any(axis=1), np.argmax(failed, axis=1), NEVER)


class MannWhitney:
    """Kayenta's judge every 30 minutes. The statistic is how many of the 900 differences don't exceed a quarter of their median."""

    name = "Mann-Whitney every 30 min"

    def statistic(self, paths: Paths) -> Floats:
        """[rollout, judgement]; smaller is stronger."""
        minutes = [_summed(x, 2, 2) for x in (paths.bad_c, paths.total_c, paths.bad_s, paths.total_s, paths.asked_c, paths.asked_s)]
        slow_c, slow_s = _summed(paths.slow_c, 2, 2), _summed(paths.slow_s, 2, 2)
        pairs = [(_ratio(minutes[0], minutes[1]), _ratio(minutes[2], minutes[3])),
                 (worlds.p99(minutes[4], slow_c), worlds.p99(minutes[5], slow_s))]
        rollouts = paths.bad_c.shape[0]
        out = np.full((rollouts, LOOKS // _WINDOW), 900.0)
        for c, s in pairs:
            for j in range(LOOKS // _WINDOW):
                part = slice(j * _POINTS, (j + 1) * _POINTS)
                differences = (c[:, part, None] - s[:, None, part]).reshape(rollouts, -1)
                bound = 0.25 * np.abs(np.median(differences, axis=1))
                out[:, j] = np.minimum(out[:, j], (differences <= bound[:, None]).sum(axis=1))
        return out

    def tune(self, drawn: Sequence[Paths]) -> float:
        smallest = np.sort(np.concatenate([self.statistic(p).min(axis=1) for p in drawn]))
        allowed = int(GOAL * len(smallest))
        return float(smallest[allowed]) - 1.0  # whole numbers: with "≤ the one below" at most so many fail

    def fails_at(self, paths: Paths, threshold: float) -> Ints:
        failed = self.statistic(paths) <= threshold
        return np.where(failed.any(axis=1), (np.argmax(failed, axis=1) + 1) * _WINDOW - 1, NEVER)


@dataclass(frozen=True)
class Told:
    """Wald's test of the candidate's errors at a constant base, told how much `more` of its requests fail if it is bad."""

    more: float
    name = "told base rate and harm (Wald)"

    def statistic(self, paths: Paths) -> Floats:
        bad, good = np.cumsum(paths.bad_c, axis=1), np.cumsum(paths.total_c - paths.bad_c, axis=1)
        share = worlds.BASE + self.more
        return bad * np.log(share / worlds.BASE) + good * np.log((1.0 - share) / (1.0 - worlds.BASE))

    def tune(self, drawn: Sequence[Paths]) -> float:
        return _tuned([self.statistic(p) for p in drawn])

    def fails_at(self, paths: Paths, threshold: float) -> Ints:
        failed = self.statistic(paths) > threshold
        return np.where(failed.any(axis=1), np.argmax(failed, axis=1), NEVER)


COUNTING = (
    Counting("Argo Rollouts, 5 min, failureLimit 3", 10, 10, 4),
    Counting("Argo Rollouts, each look, failureLimit 3", 1, 1, 4),
    Counting("Argo Rollouts, 5 min each look, failureLimit 3", 10, 1, 4),
    Counting("Argo Rollouts, 5 min each look, failureLimit 10", 10, 1, 11),
    Counting("Flagger, threshold 5", 2, 2, 5, together=True),
    Counting("fixed threshold, 3 in a row", 1, 1, 3, consecutive=True),
    Counting("fixed threshold, 10 in a row", 1, 1, 10, consecutive=True),
)


class Rivals:
    """All rules, tuned once on paths of the constant world."""

    def __init__(
        self, rng: np.random.Generator, rollouts: int, harms: Iterable[float] = (), advance: Callable[[], None] = lambda: None,
    ) -> None:
        drawn = [draw("constant", rng, min(_TUNE_CHUNK, rollouts - i), worlds.Harm()) for i in range(0, rollouts, _TUNE_CHUNK)]
        self.fixed: dict[str, tuple[Counting, tuple[float, float]]] = {}
        for rule in COUNTING:
            self.fixed[rule.name] = rule, rule.tune(drawn)
            advance()
        self.z, self.mw = ZTest(), MannWhitney()
        self.z_threshold, self.mw_threshold = self.z.tune(drawn), self.mw.tune(drawn)
        advance()
        self.told = {more: (rule, rule.tune(drawn)) for more in harms for rule in [Told(more)]}

    def fails_at(self, paths: Paths, more: float | None = None) -> dict[str, Ints]:
        """Rule → look of its rollback per rollout. `more`: what the rule that is told the harm is told."""
        out = {f"{name}, tuned": rule.fails_at(paths, thresholds) for name, (rule, thresholds) in self.fixed.items()}
        out[f"{self.z.name}, tuned"] = self.z.fails_at(paths, self.z_threshold)
        out[f"{self.mw.name}, tuned"] = self.mw.fails_at(paths, self.mw_threshold)
        if more in self.told:
            told, threshold = self.told[more]
            out[told.name] = told.fails_at(paths, threshold)
        out["Argo Rollouts, customary (errors ≤ 5 %)"] = COUNTING[0].fails_at(paths, _CUSTOMARY_ARGO)
        out["Flagger, customary (success ≥ 99 %)"] = COUNTING[-3].fails_at(paths, _CUSTOMARY_FLAGGER)
        out["z-test, customary (z > 1.96)"] = self.z.fails_at(paths, 1.96)
        out["Kayenta, customary (98 %, effect ¼)"] = self.mw.fails_at(paths, _KAYENTA_98)
        return out

    @property
    def fixed_names(self) -> tuple[str, ...]:
        """Those that the goals about fixed thresholds speak of."""
        return tuple(f"{name}, tuned" for name in self.fixed)


def delay(paths: Paths, looks: Ints, from_look: int) -> Floats:
    """Candidate requests up to and with the rollback; for harm that begins at look `from_look` > 0, minutes since then.

    inf: it never came. NaN: it came before there was harm.
    """
    total = np.cumsum(paths.requests, axis=1)
    last = total.shape[1] - 1
    at = np.take_along_axis(total, np.minimum(looks, last)[:, None], axis=1)[:, 0].astype(np.float64)
    if from_look:
        at = (looks - from_look + 1) * worlds.LOOK_S / 60.0
    return np.where(looks >= NEVER, np.inf, np.where(looks < from_look, np.nan, at))
