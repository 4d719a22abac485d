"""Findings → verdict. Pure: no file, no clock. docs/drift.md is the same table in words.

What a short window of one arm differs in from a reference of months is mostly the hour, the weekday and the news. So:

- the candidate against the stable arm in the same window is what may fail a candidate: both see the same minutes;
- the candidate against its own reference may fail it only when the stable arm is not off its reference there, the two references
  differ, and by more than anything of stable's moved in this window: then what arrives is what stable was trained on and not what
  the candidate was trained on. (References are of different weeks. While the world moves, some feature is nearer to the older one.)
- arms whose requests came at different times of the window are not compared at all (the split changed inside it);
- both arms off their references in the same features is the world: hold, and say so (rule 7);
- scores of two models differ by design and are never compared here (the rollout's `scores` gate does, in pairs); a
  candidate's scores fail it only when they left its reference by a threshold more than stable's left stable's.

Without a stable arm (a model that is watched on its own) drift from the reference is a Fail: it is an alarm, there is nothing
to roll back to. Where a stable arm was expected and has too few rows, it is NoData, also when nothing moved: the comparison that may fail a
candidate was not made, and of degraded answers the reference knows nothing. Only where the candidate has all the traffic (weight
100) nothing is missing: it passes by its reference, and is Inconclusive when it left it, since candidate and world can't be told
apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hafnium_contract.evidence import Verdict
from hafnium_monitoring.comparison import NON_FINITE, SCORE, Finding, drifted

NAMES_MAX = 5


@dataclass(frozen=True)
class Comparisons:
    """All that was compared. None: not compared, since there was no (or too little of a) stable arm."""

    candidate: tuple[Finding, ...]
    """The model under test against its own reference."""
    stable: tuple[Finding, ...] | None = None
    """The stable model against its own reference, same window."""
    between: tuple[Finding, ...] | None = None
    """The candidate's rows against the stable's, same window."""
    references: tuple[Finding, ...] | None = None
    """The candidate's reference against the stable's: was there a difference in training already?"""
    stable_expected: bool = False
    all_traffic: bool = False
    """The candidate has weight 100: that the stable arm has no rows is how it should be."""
    stable_rows: int = 0
    """How many the stable arm has, for the message."""
    split_changed: bool = False
    """The arms' requests came at different times of the window, so they can't be compared."""
    other_hours: bool = False
    """The reference has too few rows of the window's hours: the hour alone may move values."""


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    message: str
    both_arms: bool = False


def judge(found: Comparisons) -> Judgement:
    """The verdict, and one sentence for who is on call."""
    moved = drifted(found.candidate)
    broken = [f for f in moved if f.statistic == NON_FINITE]
    if broken:
        return Judgement("Fail", f"{names(broken)}: no world explains that, and nothing can be decided by them; look at the model")
    if found.stable is None or found.between is None:
        return _alone(moved, found)
    if found.split_changed:
        return Judgement(
            "Inconclusive", "the two arms' requests came at different times of the window (its traffic split changed, or one "
            "arm's log has gaps), so they can't be compared; the next window decides",
        )
    differ = drifted(found.between)
    if differ:
        return Judgement(
            "Fail", f"the candidate's inputs differ from the stable model's in the same window: {names(differ)}; "
            "both see the same traffic, so look at the candidate's feature code, views and contract",
        )
    stable = {f.name: f for f in found.stable}
    references = {f.name: f for f in found.references or ()}
    world_moved = max((_size(f) for f in drifted(found.stable) if f.statistic != NON_FINITE), default=0.0)
    world = [f for f in moved if f.name in stable and stable[f.name].drifted]
    own = [f for f in moved if f not in world and _own_fault(f, stable, references, world_moved)]
    if own:
        return Judgement(
            "Fail", f"what arrives is what the stable model was trained on, and not what the candidate was: {names(own)}; "
            "its training data or its contract differ from production",
        )
    if world:
        return Judgement(
            "Inconclusive", f"both models' inputs left their references and do not differ from each other: {names(world)}; "
            "the world changed, not the candidate", both_arms=True,
        )
    if moved:
        return Judgement(
            "Inconclusive", f"the candidate left its reference a little more than the stable model did ({names(moved)}), "
            "but the two do not differ from each other; wait for more rows",
        )
    return Judgement("Pass", "the candidate's inputs are like its reference and like the stable model's in the same window")


def _alone(moved: Sequence[Finding], found: Comparisons) -> Judgement:
    if found.stable_expected and not found.all_traffic:
        tail = f"; the candidate left its reference ({names(moved)})" if moved else ""
        return Judgement(
            "NoData", f"the stable arm has too few rows in the window ({found.stable_rows}), so the candidate can't be compared with it: "
            f"is its log named, and written?{tail}",
        )
    if not moved:
        tail = "; it has all the traffic, so there is no stable arm to compare with" if found.stable_expected else ""
        return Judgement("Pass", f"the model's inputs and scores are like its reference{tail}")
    if found.stable_expected:
        return Judgement(
            "Inconclusive", f"the candidate left its reference ({names(moved)}), and has all the traffic, so no stable arm tells whether "
            "the world did",
        )
    if found.other_hours and all(f.statistic == "psi" for f in moved):
        return Judgement(
            "Inconclusive", f"the model's inputs or scores left its reference ({names(moved)}), which has too few rows of these hours "
            "to tell whether that is the hour; a larger reference, or a window of a day, can",
        )
    return Judgement("Fail", f"the model's inputs or scores left its reference: {names(moved)}")


def _own_fault(
    finding: Finding, stable: Mapping[str, Finding], references: Mapping[str, Finding], world_moved: float,
) -> bool:
    """Whether a drift from the candidate's reference, which the stable arm doesn't show, is the candidate's own.

    `world_moved`: the largest drift of the stable arm, in multiples of its feature's threshold; 0 for none.
    """
    theirs = stable.get(finding.name)
    if theirs is None:
        # A feature that only the candidate has: no control. Blame it only when nothing else moved in this window.
        return world_moved == 0
    if _size(finding) <= world_moved:
        return False
    if finding.name == SCORE:
        return finding.threshold is not None and finding.value - theirs.value >= finding.threshold
    # The two arms' inputs are alike, so one can be off its reference alone only if the references differ. When they don't,
    # one arm is just above and the other just below the line, which is chance.
    known = references.get(finding.name)
    return known is not None and known.drifted


def _size(finding: Finding) -> float:
    return abs(finding.value) / (finding.threshold or 1.0)


def names(findings: Sequence[Finding]) -> str:
    """`a (PSI 1.20), b (PSI 0.31) and 3 more`, largest first."""
    ordered = sorted(findings, key=lambda f: -_size(f))
    text = ", ".join(str(f) for f in ordered[:NAMES_MAX])
    return text + (f" and {len(ordered) - NAMES_MAX} more" if len(ordered) > NAMES_MAX else "")
