"""The plan against simulation of the process that it foretells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hafnium_rollout_world import rollout
from scipy.stats import invgauss

from hafnium_contract.errors import InputError
from hafnium_rollout import commands
from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.statistics import plan, tilt

GOAL = math.log(100.0)
LOOK = 40  # candidate requests: small, so that the time between two looks doesn't blur the hitting time


def test_the_hitting_time_is_the_inverse_gaussian() -> None:
    level, mu, var = 7.0, 0.01, 0.05
    shape = level * level / var
    for q in (0.1, 0.5, 0.9):
        expected = float(invgauss.ppf(q, level / mu / shape, scale=shape))
        assert plan._quantile(level, mu, var, q) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("base", "effect", "weight", "restarts"), [
    (0.01, 0.02, 0.05, False), (0.01, 0.01, 0.05, False), (0.005, 0.01, 0.05, False), (0.01, 0.02, 0.5, False), (0.01, 0.02, 0.05, True),
])
def test_time_to_fail_is_foretold_within_a_fifth(base: float, effect: float, weight: float, restarts: bool) -> None:
    rng = np.random.default_rng(1)
    found: list[int] = []
    others = round(LOOK * (1 - weight) / weight)
    for _ in range(150):
        state, seen = tilt.FailState(), 0
        while tilt.log_e_fail([state], 0.0) < GOAL and seen < 20_000:
            state = tilt.add_fail(state, int(rng.binomial(LOOK, base + effect)), LOOK, int(rng.binomial(others, base)), others,
                                  look_s=8.0, restarts=restarts)
            seen += LOOK
        found.append(seen)
    foretold = plan.requests_to_fail(base + effect, base, weight, 0.01, restarts=restarts)
    assert foretold == pytest.approx(sorted(found)[75], rel=0.2)


@pytest.mark.parametrize("base", [0.002, 0.01])
def test_time_to_pass_is_foretold_within_a_fifth(base: float) -> None:
    rng = np.random.default_rng(2)
    found: list[int] = []
    for _ in range(60):
        state, seen = tilt.PassState(), 0
        while tilt.log_e_pass(state, 0.005) < GOAL and seen < 40_000:
            n = 2 * LOOK
            state = tilt.add_pass(state, int(rng.binomial(n, base)), n, int(rng.binomial(19 * n, base)), 19 * n)
            seen += n
        found.append(seen)
    foretold = plan.requests_to_pass(base, base, 0.05, 0.01, 0.005)
    assert foretold == pytest.approx(sorted(found)[30], rel=0.2)


def test_what_cannot_come_is_said() -> None:
    assert plan.requests_to_fail(0.01, 0.01, 0.05, 0.01) is None
    assert plan.requests_to_pass(0.03, 0.01, 0.05, 0.01, 0.005) is None
    assert plan.chance_of_fail(0.01, 0.01, 0.05, 0.01, 1e6) == 0.0


def test_dispersion_makes_it_longer_in_proportion() -> None:
    one = plan.requests_to_fail(0.03, 0.01, 0.05, 0.01)
    three = plan.requests_to_fail(0.03, 0.01, 0.05, 0.01, phi=3.0)
    assert one is not None
    assert three == pytest.approx(3 * one, rel=0.05)


def test_the_command_prints_every_step_with_traffic_to_compare(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(rollout().model_dump(mode="json", exclude_none=True)))
    lines = commands.plan_table(file, rate=100, base=0.01, regression=0.02).splitlines()
    assert [x.split()[0] for x in lines[1:4]] == ["shadow", "5%", "25%"]
    assert "at most 1 % of rollouts" in lines[-1]
    assert "+2 points is not failed by the end of the steps in at most" in lines[-2]
    found = commands.plan(file, rate=100, base=0.0, regression=0.02)
    assert 0 <= found["missedMax"] <= min(g["missed"] for g in found["gates"])
    assert found["falseRollbackMax"] == 0.01
    assert 300 <= found["gates"][1]["pass_requests"] <= 600  # no errors, margin .02: about 380 are needed
    with pytest.raises(InputError, match="rate must be"):
        commands.plan(file, rate=0, base=0.01, regression=0.02)


def test_the_expected_time_is_that_of_the_slowest_gate_each_step_waits_for(tmp_path: Path) -> None:
    errors = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.005}}
    slow = {"name": "slow", "latency": {"slowerThan": "100ms"}, "compare": {"margin": 0.1}}
    steps = [{"weight": 5}, {"weight": 25}, {"weight": 100}]
    file = tmp_path / "r.yaml"

    def planned(gates: list[dict[str, Any]], base: float, steps: list[dict[str, Any]] = steps) -> dict[str, Any]:
        file.write_text(json.dumps(rollout(gates=gates, strategy={"steps": steps}).model_dump(mode="json", exclude_none=True)))
        return commands.plan(file, rate=100, base=base, regression=0.02)

    for gates in ([errors, slow], [slow, errors]):
        found = planned(gates, 0.01)
        times = {(g["step"], g["gate"]): g["pass_s"] for g in found["gates"]}
        assert times[0, "errors"] > times[0, "slow"]
        assert {g["step_s"] for g in found["gates"] if g["step"] == 0} == {times[0, "errors"]}, "each gate has the whole step to fail"
        assert found["expectedSeconds"] == pytest.approx(times[0, "errors"] + times[1, "errors"])
    shown = [errors | {"role": "Advisory"}, slow | {"role": "Safety"}]
    assert planned(shown, 0.01)["expectedSeconds"] == pytest.approx(times[0, "slow"] + times[1, "slow"]), "nobody waits for Advisory"
    early = [errors, slow | {"requiredIn": ["shadow"]}]
    assert planned(early, 0.01)["expectedSeconds"] == pytest.approx(times[0, "errors"] + times[1, "errors"])
    drift = [{"name": "drift", "role": "Safety", "drift": {}}]
    dwell = [{"weight": 5, "minDwell": "1m", "minSamples": 100}, {"weight": 50, "minSamples": 5000}, {"weight": 100}]
    assert planned(drift, 0.01, dwell)["expectedSeconds"] == pytest.approx(60 + 100), "what a step takes whatever its gates say"


def test_a_step_whose_deadline_comes_before_its_pass_pauses_and_there_is_no_expected_time(tmp_path: Path) -> None:
    """1 % of errors at 2 requests/s and 5 %: a Pass takes hours, the deadline 20 minutes. A World with these numbers pauses, too."""
    errors = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.005}}
    file = tmp_path / "r.yaml"
    for deadline, pauses in (("20m", True), ("7d", False)):
        spec = rollout(gates=[errors], strategy={"steps": [{"weight": 5, "deadline": deadline}, {"weight": 100}]})
        file.write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True)))
        found = commands.plan(file, rate=2, base=0.01, regression=0.02)
        (row,) = found["gates"]
        assert (row["pauses"], found["expectedSeconds"] is None) == (pauses, pauses)
        said = commands.plan_table(file, rate=2, base=0.01, regression=0.02)
        assert ("pauses first" in said, "pauses before 100 %" in said) == (pauses, pauses)
        assert (row["missed"] > 0.9) == pauses, "within 20 minutes there are 120 requests to see it by"


def test_gates_that_take_nothing_back_or_cannot_be_planned_are_not_in_the_chances(tmp_path: Path) -> None:
    errors = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.005}}
    others: list[dict[str, Any]] = [
        {"name": "drift", "role": "Safety", "drift": {}}, {"name": "scores", "scores": {}},
        {"name": "later", "evidence": {"kind": "smoke"}, "requiredIn": []},
    ]
    file = tmp_path / "r.yaml"

    def planned(gates: list[dict[str, Any]]) -> dict[str, Any]:
        file.write_text(json.dumps(rollout(gates=gates).model_dump(mode="json", exclude_none=True)))
        return commands.plan(file, rate=100, base=0.01, regression=0.02)

    alone = planned([errors])
    assert alone["unplanned"] == []
    found = planned([errors, errors | {"name": "shown", "role": "Advisory", "compare": {"margin": 0.5}}, *others])
    assert found["unplanned"] == ["drift", "scores"]
    assert found["missedMax"] == pytest.approx(alone["missedMax"], abs=0.01)
    assert "when drift and scores pass in time" in commands.plan_table(file, rate=100, base=0.01, regression=0.02)
    nobody = planned(others)
    assert (nobody["missedMax"], nobody["gates"]) == (None, [])
    assert "no gate that counts requests" in commands.plan_table(file, rate=100, base=0.01, regression=0.02)


def test_a_plan_with_a_gate_that_never_passes_has_no_expected_time(tmp_path: Path) -> None:
    gates = [{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 1e-9}},
             {"name": "slow", "latency": {"slowerThan": "1s"}}]
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(rollout(gates=gates).model_dump(mode="json", exclude_none=True)))
    found = commands.plan(file, rate=100, base=0.3, regression=0.02)
    assert None in {g["step_s"] for g in found["gates"]}
    assert found["expectedSeconds"] is None


def test_the_alphas_of_all_gates_and_limits_add_up_to_the_rollouts() -> None:
    gates = [
        {"name": "errors", "role": "Safety", "requests": {}, "hardLimit": 0.2}, {"name": "slow", "latency": {"slowerThan": "100ms"}},
        {"name": "scores", "scores": {}}, {"name": "drift", "drift": {}}, {"name": "shown", "role": "Advisory", "requests": {}},
    ]
    spec = rollout(gates=gates).spec
    parts = alpha_parts(spec)
    each = {g.name: alphas_of(g, parts) for g in spec.gates}
    used = each["errors"][0] + each["errors"][1] + each["slow"][0] + each["scores"][0] + each["drift"][0]
    assert used == pytest.approx(0.01)
    assert each["errors"][0] > each["slow"][0] > each["scores"][0] > each["errors"][1] > 0
    assert each["shown"] == (0.01, 0.01)  # it can't take the candidate back
