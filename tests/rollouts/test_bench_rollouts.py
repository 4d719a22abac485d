"""The benchmark's shortcuts against the production code that they stand for."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "rollouts"))

import climb
import findings
import paths
import rivals
import worlds

from hafnium_monitoring.psi import Binning, psi_test
from hafnium_rollout.gates import GateContext, judge
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.observation import Counts, GateLook, Look, Series
from hafnium_rollout.status import GateStatus

ROLLOUTS = 2


def _few(drawn: rivals.Paths, rollout: int) -> dict[str, Any]:
    return {n: getattr(drawn, n)[rollout].tolist() for n in drawn.__dataclass_fields__}


@pytest.mark.parametrize("world", worlds.WORLDS)
@pytest.mark.parametrize("with_phi", [True, False], ids=["phi given", "plain"])
def test_paths_as_arrays_are_what_judge_says_look_by_look(world: str, with_phi: bool) -> None:
    rng = np.random.default_rng(17)
    drawn = rivals.draw(world, rng, ROLLOUTS, worlds.Harm(errors=0.004, from_look=200))
    phi = [(climb.Phi(3.5, 2.0), climb.Phi(2.5, 1.0)), (climb.Phi(1.1, 1.0), climb.Phi(1.3, 1.3))] if with_phi else None
    spec = climb.sample(None, None).spec
    found = paths.evidence(drawn, spec, phi)
    parts = alpha_parts(spec)
    for rollout in range(ROLLOUTS):
        p = _few(drawn, rollout)
        spec = (climb.sample(*phi[rollout]) if phi else climb.sample(None, None)).spec
        for gate, expected in ((spec.gates[0], found.errors[rollout]), (spec.gates[1], found.latency[rollout])):
            status, now = GateStatus(name=gate.name, role=gate.role), climb.START
            alpha, limit = alphas_of(gate, parts)
            failed = False
            for i in range(rivals.LOOKS):
                started, now = now, now + timedelta(seconds=worlds.LOOK_S)
                if gate.name == "errors":
                    series = (Series(Counts(p["bad_s"][i], p["total_s"][i]), Counts(p["bad_c"][i], p["total_c"][i])),)
                else:
                    series = tuple(
                        Series(Counts(p["slow_s"][i][k], p["asked_s"][i]), Counts(p["slow_c"][i][k], p["asked_c"][i])) for k in (1, 2))
                context = GateContext(
                    now=now, shadow=False, weight=5, digest="", step_since=climb.START, counts_for_pass=False, counts_for_fail=True,
                    run_since=climb.START, alpha_fail=alpha, alpha_limit=limit, fresh=timedelta(minutes=1),
                )
                status = judge(gate, status, Look(started, now, {gate.name: GateLook(series)}), (), "", context)
                if status.verdict == "Fail":
                    failed = True
                    assert expected[i] >= math.log(1.0 / alpha)
                elif not failed:
                    assert expected[i] < math.log(1.0 / alpha)
                # without evidence for Pass the statistic is the larger of ln e and 0
                assert status.statistic == pytest.approx(max(float(expected[i]), 0.0), rel=1e-9, abs=1e-9)


def test_drift_findings_on_drawn_counts_are_those_on_drawn_rows() -> None:
    """The same test, once on counts per bin and once on rows that were put into bins."""
    rng = np.random.default_rng(3)
    bins = Binning(np.arange(1, 10) / 10)
    rows = [rng.random(2000), rng.beta(1.1, 1.0, 3000)]
    counts = [bins.counts(r)[:-1] for r in rows]  # nothing is missing
    assert psi_test(counts[0], counts[1], ordered=True) == psi_test(bins.counts(rows[0]), bins.counts(rows[1]), ordered=True)


@pytest.mark.parametrize("psi", [0.0, 0.01, 0.1, 0.25])
def test_shares_are_moved_by_the_psi_that_was_asked_for(psi: float) -> None:
    moved, plain = findings.moved(psi), np.full(findings.BINS, 1 / findings.BINS)
    assert float(np.sum((moved - plain) * np.log(moved / plain))) == pytest.approx(psi, abs=1e-9)


def test_a_good_candidate_is_promoted_and_a_bad_one_goes_back_through_the_whole_of_decide() -> None:
    phi = (climb.Phi(1.0, 1.0), climb.Phi(1.0, 1.0))
    good = climb.Climb("constant", (1, 1), worlds.Harm(), phi).run()
    assert (good.phase, good.skipped) == ("Promoted", 0)
    bad = climb.Climb("constant", (1, 2), worlds.Harm(errors=0.01, live_only=True), phi).run()
    assert bad.rolled_back
    assert "errors" in bad.message


def test_p99_is_that_of_a_histogram() -> None:
    requests = np.array([1000, 1000, 100])
    slow = np.array([[500, 20, 5, 1, 0], [500, 300, 200, 100, 90], [0, 0, 0, 0, 0]])
    # 10 of 1,000 are above it: between 75 ms (20 above) and 100 ms (5 above), two thirds of the way
    assert worlds.p99(requests, slow) == pytest.approx([75 + 25 * 2 / 3, 250.0, 49.5])


def test_retries_make_the_dispersion_that_they_should() -> None:
    rng = np.random.default_rng(4)
    bad, total = worlds.bad_counts("retries", rng, np.full(20_000, 1500), np.full(20_000, 0.01))
    assert float(bad.sum() / (20_000 * 1500)) == pytest.approx(0.01, rel=0.03)
    assert float(np.var(bad) / np.mean(bad)) == pytest.approx(3.74, rel=0.05)
    assert np.all(total >= 1500)
    assert np.all(bad <= total)


def test_a_tuned_rule_goes_back_in_ten_of_a_thousand_and_a_row_of_failures_is_counted() -> None:
    rule = rivals.Counting("three in a row", 1, 1, 3, consecutive=True)
    bad = np.array([[1, 1, 0, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0]], dtype=bool)
    assert rule._count(bad).tolist() == [[1, 2, 0, 1, 2, 3, 0, 1], [1, 0, 1, 0, 1, 0, 1, 0]]
    drawn = rivals.draw("constant", np.random.default_rng(5), 400, worlds.Harm())
    for r in rivals.COUNTING[1:2]:
        assert float(np.mean(r.fails_at(drawn, r.tune([drawn])) < rivals.NEVER)) <= 0.0126


def test_who_is_told_both_rates_goes_back_in_ten_of_a_thousand_and_sooner_than_who_is_not() -> None:
    rng = np.random.default_rng(6)
    equal = [rivals.draw("constant", rng, 500, worlds.Harm()) for _ in range(2)]
    worse = rivals.draw("constant", rng, 400, worlds.Harm(errors=0.01))
    rules = rivals.Rivals(rng, 1000, (0.01,))
    found = rules.fails_at(worse, 0.01)
    told, threshold = rules.told[0.01]
    assert told.statistic(worse)[0, 0] == pytest.approx(
        worse.bad_c[0, 0] * np.log(0.02 / 0.01) + (worse.total_c - worse.bad_c)[0, 0] * np.log(0.98 / 0.99))
    assert threshold < np.log(1 / rivals.GOAL)  # Ville's bound; looks are seldom and end after four hours
    assert np.mean([told.fails_at(p, threshold) < rivals.NEVER for p in equal]) <= 0.02
    means = {name: float(np.mean(rivals.delay(worse, looks, 0))) for name, looks in found.items() if name.endswith(("tuned", "(Wald)"))}
    assert min(means, key=lambda n: means[n]) == told.name
    assert told.name not in rules.fails_at(worse)
