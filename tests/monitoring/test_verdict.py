"""The table of verdicts, case by case."""

from __future__ import annotations

import pytest

from hafnium_monitoring.comparison import Finding
from hafnium_monitoring.verdict import Comparisons, judge


def finding(name: str, drifted: bool = True, value: float = 0.5, threshold: float = 0.1) -> Finding:
    return Finding(name, "psi", value if drifted else min(value, 0.01), threshold, 1e-9 if drifted else 0.9, drifted, drifted)


CALM = (finding("a", False), finding("b", False), finding("score", False))
A = (finding("a"), finding("b", False), finding("score", False))
B = (finding("a", False), finding("b", value=0.9), finding("score", False))
SCORE = (finding("a", False), finding("b", False), finding("score", value=0.3, threshold=0.05))


@pytest.mark.parametrize(("found", "verdict", "both"), [
    pytest.param(Comparisons(CALM), "Pass", False, id="alone and calm"),
    pytest.param(Comparisons(A), "Fail", False, id="alone and drifted"),
    pytest.param(Comparisons(CALM, stable_expected=True), "NoData", False, id="stable arm too small, calm"),
    pytest.param(Comparisons(A, stable_expected=True), "NoData", False, id="stable arm too small, drifted"),
    pytest.param(Comparisons(CALM, stable_expected=True, all_traffic=True), "Pass", False, id="weight 100, calm"),
    pytest.param(Comparisons(A, stable_expected=True, all_traffic=True), "Inconclusive", False, id="weight 100, drifted"),
    pytest.param(Comparisons(A, other_hours=True), "Inconclusive", False, id="alone and drifted, at hours that the reference lacks"),
    pytest.param(
        Comparisons((*CALM, Finding("missing:a", "missing_share_change", 0.1, 0.02, 1e-9, True, True)), other_hours=True), "Fail", False,
        id="alone and values missing, at whatever hour",
    ),
    pytest.param(Comparisons(CALM, other_hours=True), "Pass", False, id="alone and calm, at hours that the reference lacks"),
    pytest.param(Comparisons(CALM, CALM, CALM, CALM), "Pass", False, id="all calm"),
    pytest.param(Comparisons(CALM, CALM, A, CALM), "Fail", False, id="arms differ"),
    pytest.param(Comparisons(A, A, A, CALM), "Fail", False, id="world moved and arms differ"),
    pytest.param(Comparisons(A, A, CALM, CALM), "Inconclusive", True, id="world"),
    pytest.param(Comparisons(A, CALM, CALM, A), "Fail", False, id="trained on something else"),
    pytest.param(Comparisons(A, B, CALM, A), "Inconclusive", False, id="trained on other weeks, while the world moves as much"),
    pytest.param(
        Comparisons((finding("a", value=2.0), *A[1:]), B, CALM, A), "Fail", False,
        id="trained on something else, further away than the world moves",
    ),
    pytest.param(
        Comparisons(SCORE, B, CALM, CALM), "Inconclusive", False, id="the candidate's scores moved while its world moves more",
    ),
    pytest.param(Comparisons(A, CALM, CALM, CALM), "Inconclusive", False, id="just above and just below the line"),
    pytest.param(Comparisons((finding("new"), *CALM), CALM, CALM, CALM), "Fail", False, id="new feature, calm world"),
    pytest.param(Comparisons((finding("new"), *A), A, CALM, CALM), "Inconclusive", True, id="new feature, moved world"),
    pytest.param(Comparisons(SCORE, CALM, CALM, CALM), "Fail", False, id="only the candidate's scores moved"),
    pytest.param(
        Comparisons(SCORE, (*CALM[:2], Finding("score", "psi", 0.27, 0.05, 1e-3, True)), CALM, CALM), "Inconclusive", False,
        id="the candidate's scores moved a little more",
    ),
    pytest.param(Comparisons(SCORE, SCORE, CALM, CALM), "Inconclusive", True, id="scores of both moved"),
    pytest.param(Comparisons(CALM, A, CALM, CALM), "Pass", False, id="only the stable model is off its reference"),
])
def test_verdict(found: Comparisons, verdict: str, both: bool) -> None:
    judgement = judge(found)
    assert (judgement.verdict, judgement.both_arms) == (verdict, both)


def test_the_message_names_the_largest_first_and_stays_short() -> None:
    many = tuple(finding(f"f{i}", value=float(i + 1)) for i in range(9))
    message = judge(Comparisons(many)).message
    assert "f8 (PSI 9.00), f7" in message
    assert message.endswith("and 4 more")
