"""Which measurements let a model out. Pure: numbers in, verdicts out.

A gate fails only on what was measured well enough to say so. Where the data are too few the verdict is "not enough data" (which stops
a model only where nothing else says that it is any good: "better_than_chance"), and
where a limit is crossed by less than the uncertainty it is "advisory": both are shown, in the error, the evaluation and the model
card, and neither passes silently as "pass". Without that rule the gates would be dice: with eighty frauds in the test rows, the
PR-AUC of the same model trained with another seed differs by 5 %, and one of two equally good models would always be refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hafnium_contract.errors import HafniumError
from hafnium_training.dataset import POSITIVES_MIN
from hafnium_training.evaluation import SLICE_ROWS_MIN, Comparison, Measured, Quality
from hafnium_training.export import PARITY_LIMIT, Parity
from hafnium_training.fairness import Fairness
from hafnium_training.latency import Latency
from hafnium_training.robustness import Robustness

DROP_MAX = 0.02
"""ROC-AUC and PR-AUC may fall by this share of production's."""
LATENCY_RATIO_MAX = 1.05
LATENCY_FLOOR_MS = 0.05
"""A difference below this does not count: it is 5 % of 1 ms, about the least that an answer over HTTP takes, while the model alone
takes 0.05 ms and one more category feature makes it 10 % slower."""
FAIRNESS_MAX = 0.1
DISPARATE_IMPACT = (0.8, 1.25)
SLICE_GAP_MAX = 0.1
ECE_MAX = 0.05

Verdict = Literal["pass", "fail", "advisory", "not enough data", "not measured"]


@dataclass(frozen=True)
class Gate:
    """One rule. `value` stays out of files when it is a measured time (`reproducible` false)."""

    name: str
    verdict: Verdict
    value: float | None
    limit: str
    message: str
    reproducible: bool = True
    needed: bool = False
    """Without an answer to it no model goes out: "not enough data" stops it as "fail" does."""

    @property
    def stops(self) -> bool:
        return self.verdict == "fail" or (self.needed and self.verdict == "not enough data")


class GatesFailed(HafniumError):  # noqa: N818 - named for what happened, like the command's exit message
    """The model is not good enough: no bundle was written. `gates` holds all of them, failed or not."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self.gates = tuple(gates)
        self.failed = tuple(g for g in gates if g.stops)
        lines = "\n".join(f"  {g.name}: {g.message} (limit: {g.limit})" for g in self.failed)
        count = len(self.failed)
        super().__init__(f"{count} gate{'s' if count != 1 else ''} failed, so no bundle was written\n{lines}")


@dataclass(frozen=True)
class Findings:
    """Everything that the gates look at."""

    quality: Quality
    fairness: tuple[Fairness, ...]
    robustness: Robustness
    parity: Parity
    comparison: Comparison | None
    latency: Latency | None


def judge(found: Findings) -> tuple[Gate, ...]:
    """All gates, in the order in which a reader wants them."""
    return (
        *_soundness(found), *_slices(found.quality), *(_fairness(f) for f in found.fairness),
        *_production(found.comparison, found.latency),
    )


def require(gates: Sequence[Gate]) -> None:
    """Raises GatesFailed when any gate failed, or one has no answer without which no model goes out."""
    if any(g.stops for g in gates):
        raise GatesFailed(gates)


def _soundness(found: Findings) -> tuple[Gate, ...]:
    metrics = found.quality.metrics
    ece, chance = metrics["ece"], metrics["ece_by_chance"]
    mono = found.robustness.monotonicity
    worst = max(mono.features, key=lambda n: mono.features[n], default="")
    return (
        Gate("parity", _pass(found.parity.worst <= PARITY_LIMIT), found.parity.worst, f"≤ {PARITY_LIMIT:g}",
             ("torch and ONNX Runtime differ" if found.parity.against == "torch" else "a row alone and in a batch differs")
             + f" by at most {found.parity.worst:.2g} over {found.parity.rows} difficult rows"),
        Gate("monotone_violations", _pass(mono.violations == 0), mono.violations, "0",
             f"{mono.violations} of {mono.pairs} pairs break a direction of the contract"
             + (f", most for {worst}; largest fall {mono.largest:.2g}" if mono.violations else "")),
        _better_than_chance(found.quality),
        Gate("calibration", _calibration(ece, chance), ece.value, f"≤ {ECE_MAX:g}",
             f"expected calibration error {ece.value:.4f} (bins of equal mass); perfect calibration would show {chance.value:.4f}"),
    )


def _better_than_chance(quality: Quality) -> Gate:
    auc = quality.metrics["roc_auc"]
    negatives = quality.rows - quality.positives
    limit = "lower end of the 95 % interval > 0.5"
    if min(quality.positives, negatives) < POSITIVES_MIN:
        return Gate(
            "better_than_chance", "not enough data", None, f"{limit}, measured on at least {POSITIVES_MIN} rows of each label",
            f"{quality.positives} positives and {negatives} negatives: give data over a longer time", needed=True,
        )
    return Gate(
        "better_than_chance", _pass(auc.lower > 0.5), auc.value, limit, f"ROC-AUC {auc.value:.3f} [{auc.lower:.3f}, {auc.upper:.3f}]",
        needed=True,
    )


def _slices(quality: Quality) -> tuple[Gate, ...]:
    """One gate per attribute: its worst slice. A gap counts when the slice's whole interval lies beyond it."""
    overall = quality.metrics["roc_auc"].value
    out: list[Gate] = []
    limit = f"ROC-AUC at most {SLICE_GAP_MAX:g} below the whole, slices of ≥ {SLICE_ROWS_MIN} rows"
    for attribute in dict.fromkeys(s.attribute for s in quality.slices):
        slices = [s for s in quality.slices if s.attribute == attribute]
        measured = [(overall - s.roc_auc.value, s) for s in slices if s.roc_auc is not None]
        name = f"slices.{attribute}"
        if not measured:
            out.append(Gate(name, "not enough data", None, limit, f"none of {len(slices)} slices has enough positives"))
            continue
        gap, worst = max(measured, key=lambda x: x[0])
        sure = [s for g, s in measured if g > SLICE_GAP_MAX and s.roc_auc and overall - s.roc_auc.upper > SLICE_GAP_MAX]
        verdict: Verdict = "fail" if sure else "advisory" if gap > SLICE_GAP_MAX else "pass"
        skipped = len(slices) - len(measured)
        out.append(Gate(
            name, verdict, gap, limit, f"{attribute} = {worst.value}: ROC-AUC is {gap:+.3f} below the whole "
            f"({worst.rows} rows, {worst.positives} positives)" + (f"; {skipped} slices with too few positives" if skipped else ""),
        ))
    return tuple(out)


def _fairness(f: Fairness) -> Gate:
    name = f"fairness.{f.attribute}.{f.measure}"
    ratio = f.measure == "disparate_impact"
    limit = f"{DISPARATE_IMPACT[0]:g} to {DISPARATE_IMPACT[1]:g}" if ratio else f"≤ {FAIRNESS_MAX:g}"
    if f.value is None or f.lower is None or f.upper is None:
        few = ", ".join(f.left_out) or "every group"
        return Gate(name, "not enough data", None, limit, f"too few positives or decisions in {few}")
    beyond = f.value < DISPARATE_IMPACT[0] if ratio else f.value > FAIRNESS_MAX
    surely = f.upper < DISPARATE_IMPACT[0] if ratio else f.lower > FAIRNESS_MAX
    verdict: Verdict = "fail" if surely else "advisory" if beyond else "pass"
    left = f"; too few data: {', '.join(f.left_out)}" if f.left_out else ""
    return Gate(name, verdict, f.value, limit, f"{f.value:.3f} [{f.lower:.3f}, {f.upper:.3f}] between {', '.join(f.groups)}{left}")


def _production(comparison: Comparison | None, latency: Latency | None) -> tuple[Gate, ...]:
    quality_limit = f"down at most {DROP_MAX:.0%} of production's"
    latency_limit = f"at most {LATENCY_RATIO_MAX - 1:.0%} slower than production (less than {LATENCY_FLOOR_MS:g} ms does not count)"
    if comparison is None or latency is None:
        none = "no production bundle given"
        return (
            Gate("production.roc_auc", "not measured", None, quality_limit, none),
            Gate("production.pr_auc", "not measured", None, quality_limit, none),
            Gate("production.latency", "not measured", None, latency_limit, none, reproducible=False),
        )
    out: list[Gate] = []
    for metric, change in comparison.change.items():
        down = change.value < -DROP_MAX
        # The paired interval has to lie below "no change at all": the drop is then real, and its best estimate is over the limit.
        verdict: Verdict = "fail" if down and change.upper < 0.0 else "advisory" if down else "pass"
        out.append(Gate(
            f"production.{metric}", verdict, change.value, quality_limit,
            f"{comparison.candidate[metric]:.4f} against {comparison.production[metric]:.4f} of version {comparison.version}: "
            f"{change.value:+.1%} [{change.lower:+.1%}, {change.upper:+.1%}]",
        ))
    slower = latency.lower > LATENCY_RATIO_MAX and latency.candidate_ms - latency.production_ms > LATENCY_FLOOR_MS
    out.append(Gate(
        "production.latency", _pass(not slower), latency.ratio, latency_limit,
        f"{latency.candidate_ms * 1000:.0f} µs against {latency.production_ms * 1000:.0f} µs per row: "
        f"×{latency.ratio:.2f} [{latency.lower:.2f}, {latency.upper:.2f}]", reproducible=False,
    ))
    return tuple(out)


def _calibration(ece: Measured, chance: Measured) -> Verdict:
    if ece.value <= ECE_MAX:
        return "pass"
    # What even perfect scores would show on so few rows is taken off first: the error is a mean of absolute values.
    return "fail" if ece.value - chance.value > ECE_MAX else "advisory"


def _pass(ok: bool) -> Verdict:
    return "pass" if ok else "fail"
