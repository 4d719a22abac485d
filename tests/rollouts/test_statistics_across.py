"""Scores compared across arms: what a difference is, that it seldom lies, and what the gate and the log's reader make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, World, rollout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafnium_contract.inference_log import FIXED, partition
from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.observation import GateLook
from hafnium_rollout.score_pairs import ScorePairs, ScoresAcross
from hafnium_rollout.statistics import across, betting

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
ERRORS = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}}
UNPAIRED = {"name": "scores", "role": "Quality", "scores": {"unpaired": True}, "compare": {"margin": 0.1}}
LIVE = {"steps": [{"weight": 20, "minDwell": "60s", "deadline": "1h"}, {"weight": 100, "minDwell": "10s"}]}


@settings(max_examples=60, deadline=None)
@given(SCORES, SCORES)
def test_every_score_is_used_once_in_blocks_of_neighbours(candidate: list[float], stable: list[float]) -> None:
    found = across.differences(candidate, stable)
    small, large = min(len(candidate), len(stable)), max(len(candidate), len(stable))
    assert len(found) == small
    bounds = [i * large // small for i in range(small + 1)]
    for i, d in enumerate(found):
        blocks = [v[bounds[i]:bounds[i + 1]] if len(v) == large else [v[i]] for v in (candidate, stable)]
        assert d == pytest.approx(math.fsum(blocks[0]) / len(blocks[0]) - math.fsum(blocks[1]) / len(blocks[1]), abs=1e-9)
        assert -1 - 1e-9 <= d <= 1 + 1e-9


def test_without_one_arm_there_is_nothing_and_no_score_is_no_score() -> None:
    assert across.differences([], [0.5]) == across.differences([0.5], []) == ()
    with pytest.raises(ValueError, match="outside"):
        across.differences([1.5], [0.5])


def _until(rng: np.random.Generator, shift: float, verdict: str, looks: int) -> int | None:
    """Candidate scores until the verdict at margin .02. Skewed scores whose mean moves by ± .1 over the looks, for both arms."""
    bets = betting.begin(0.02, 0.0)
    for i in range(looks):
        p = 0.2 * (1 + 0.5 * math.sin(i / 8))
        nc = int(rng.binomial(1000, 0.05))
        stable = np.where(rng.random(1000 - nc) < p, 0.95, 0.02)
        candidate = np.where(rng.random(nc) < p + shift / 0.93, 0.95, 0.02)
        bets = betting.add(bets, across.differences(candidate.tolist(), stable.tolist()))
        e = betting.log_e_above(bets, 0.0) if verdict == "Fail" else min(betting.log_e_below(bets, 0.02), betting.log_e_above(bets, -0.02))
        if e >= math.log(100.0):
            return bets.count
    return None


def test_equal_models_are_seldom_failed_while_the_mean_score_moves() -> None:
    rng = np.random.default_rng(1)
    assert sum(_until(rng, 0.0, "Fail", 120) is not None for _ in range(100)) <= 4  # nominal 1


def test_a_shift_of_the_margin_seldom_passes() -> None:
    rng = np.random.default_rng(2)
    assert sum(_until(rng, 0.02, "Pass", 120) is not None for _ in range(60)) <= 3


def test_a_large_shift_is_found() -> None:
    rng = np.random.default_rng(3)
    found = sorted(_until(rng, 0.2, "Fail", 120) or 10**9 for _ in range(30))
    assert found[15] <= 300


def _across_arms(world: World, shift: float) -> None:
    """The world's looks carry differences across arms in live steps too."""
    plain = world.observe
    rng = np.random.default_rng(5)

    def observe(seconds: float):
        seen = plain(seconds)
        if seen.look is None or not seen.look.routed_candidate:
            return seen
        scores = rng.beta(1, 4, int(seen.look.routed_candidate)) * 0.8
        other = rng.beta(1, 4, int(seen.look.routed_stable or 0)) * 0.8
        found = across.differences((scores + shift).tolist(), other.tolist())
        gates = {**seen.look.gates, "scores": GateLook(seen.look.gates["scores"].series, found)}
        return replace(seen, look=replace(seen.look, gates=gates))

    world.observe = observe  # type: ignore[method-assign]


def test_a_rollout_without_shadow_is_promoted_on_scores_across_arms() -> None:
    world = World(rollout(gates=[ERRORS, UNPAIRED], strategy=LIVE))
    _across_arms(world, 0.0)
    assert world.until("Promoted", "RolledBack") == "Promoted"
    assert any(p.name == "scores" and p.verdict == "Pass" and p.samples > 200 for h in world.status.history for p in h.gates)


def test_scores_across_arms_hold_nobody_up_where_there_is_nobody_to_compare_with() -> None:
    """The gateway takes its time, so that the last step is entered before the candidate has everything."""
    world = World(rollout(gates=[ERRORS, UNPAIRED], strategy=LIVE), live_lag=4)
    _across_arms(world, 0.0)
    assert world.until("Promoted", "RolledBack", "Paused") == "Promoted"


def test_a_first_step_at_100_is_not_passed_by_scores_that_nobody_could_compare() -> None:
    world = World(rollout(gates=[ERRORS, UNPAIRED], strategy={"steps": [{"weight": 100, "minDwell": "10s", "deadline": "10m"}]}))
    _across_arms(world, 0.0)
    assert world.until("Promoted", "RolledBack", "Paused") == "Paused"


def test_a_rollout_without_shadow_goes_back_when_scores_differ_across_arms() -> None:
    world = World(rollout(gates=[ERRORS, UNPAIRED], strategy=LIVE))
    _across_arms(world, 0.2)
    assert world.until("Promoted", "RolledBack") == "RolledBack"
    assert "differences across arms: more than 0.1" in world.status.message


def test_a_rollout_without_scores_across_arms_is_never_promoted_by_their_absence() -> None:
    world = World(rollout(gates=[ERRORS, UNPAIRED], strategy=LIVE))
    world.until_step(0)
    for _ in range(120):
        world.turn()
    assert world.weight == 20
    assert next(g for g in world.status.gates if g.name == "scores").verdict == "NoData"


def test_paired_scores_still_need_a_shadow_step() -> None:
    with pytest.raises(RolloutFileError, match="unpaired: true"):
        rollout(gates=[ERRORS, {**UNPAIRED, "scores": {}}], strategy=LIVE)


NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def _log(folder: Path, rows: list[tuple[int, str, float]], digest: str, name: str, ids: list[str] | None = None) -> None:
    columns: dict[str, list[object]] = {f.name: [None] * len(rows) for f in FIXED}
    columns |= {
        "request_id": ids or [f"{name}{i}" for i in range(len(rows))], "time": [NOW + timedelta(seconds=t) for t, _, _ in rows],
        "model_name": ["risk"] * len(rows), "model_version": ["1"] * len(rows), "model_digest": [digest] * len(rows),
        "arm": [arm for _, arm, _ in rows], "score": [s for _, _, s in rows],
    }
    path = partition(folder, NOW, "1") / f"part-{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in FIXED], schema=FIXED), path)


def test_scores_wait_until_both_logs_have_come_as_far_and_count_once(tmp_path: Path) -> None:
    stable, candidate, reader = tmp_path / "s", tmp_path / "c", ScoresAcross()
    _log(stable, [(0, "stable", 0.5)], STABLE, "1")
    _, cursor = reader.read(stable, candidate, CANDIDATE, {})  # what is there came before the step
    _log(stable, [(1, "stable", 0.5), (2, "stable", 0.25), (9, "stable", 1.0)], STABLE, "2")
    none, cursor = reader.read(stable, candidate, CANDIDATE, cursor)
    assert none == ()
    _log(candidate, [(1, "candidate", 0.75), (3, "shadow", 0.0)], CANDIDATE, "3")
    _log(candidate, [(2, "candidate", 0.0)], OTHER, "4")
    found, cursor = reader.read(stable, candidate, CANDIDATE, cursor)
    assert found == pytest.approx((0.25,))  # up to second 1 only: the candidate's log has come no further
    _log(candidate, [(10, "candidate", 0.5)], CANDIDATE, "5")
    found, cursor = reader.read(stable, candidate, CANDIDATE, cursor)
    assert found == ()  # nothing of the candidate between 1 and 9
    _log(stable, [(11, "stable", 0.25)], STABLE, "6")
    found, cursor = reader.read(stable, candidate, CANDIDATE, cursor)
    assert found == pytest.approx((0.5 - 0.625,))
    assert reader.read(stable, candidate, CANDIDATE, cursor)[0] == ()


# --- a status that could not be written -----------------------------------------------------------------------------------------


def test_scores_of_a_look_whose_status_was_not_written_count_once_when_they_are_read_again(tmp_path: Path) -> None:
    stable, candidate, reader = tmp_path / "s", tmp_path / "c", ScoresAcross()
    _, cursor = reader.read(stable, candidate, CANDIDATE, {})
    _log(stable, [(1, "stable", 0.5), (9, "stable", 0.25)], STABLE, "1")
    _, cursor = reader.read(stable, candidate, CANDIDATE, cursor)  # they wait
    _log(candidate, [(1, "candidate", 0.75), (5, "candidate", 1.0)], CANDIDATE, "2")
    first, after = reader.read(stable, candidate, CANDIDATE, cursor)
    again, after_again = reader.read(stable, candidate, CANDIDATE, json.loads(json.dumps(cursor)))
    assert first == again == pytest.approx((0.375,)), "the same, and what had waited is not lost either"
    assert after == after_again
    _log(candidate, [(10, "candidate", 0.75)], CANDIDATE, "3")
    assert reader.read(stable, candidate, CANDIDATE, after)[0] == (), "nothing of stable after 9 that isn't counted"
    _log(stable, [(11, "stable", 0.5)], STABLE, "4")
    assert reader.read(stable, candidate, CANDIDATE, reader.read(stable, candidate, CANDIDATE, after)[1])[0] == ()


def test_a_status_whose_write_was_answered_by_nobody_and_done_all_the_same_is_gone_on_from(tmp_path: Path) -> None:
    stable, candidate, reader = tmp_path / "s", tmp_path / "c", ScoresAcross()
    _, cursor = reader.read(stable, candidate, CANDIDATE, {})
    _log(stable, [(1, "stable", 0.5)], STABLE, "1")
    _log(candidate, [(1, "candidate", 0.75)], CANDIDATE, "2")
    first, after = reader.read(stable, candidate, CANDIDATE, cursor)
    assert first == (0.25,)
    assert reader.read(stable, candidate, CANDIDATE, after)[0] == ()


def test_a_cursor_that_another_leader_left_begins_anew_and_takes_nothing_that_may_have_counted(tmp_path: Path) -> None:
    stable, candidate, first, second = tmp_path / "s", tmp_path / "c", ScoresAcross(), ScoresAcross()
    _, cursor = first.read(stable, candidate, CANDIDATE, {})
    _log(stable, [(1, "stable", 0.5), (2, "stable", 0.5)], STABLE, "1")
    _log(candidate, [(1, "candidate", 0.75)], CANDIDATE, "2")
    counted, cursor = first.read(stable, candidate, CANDIDATE, cursor)
    assert counted == (0.25,)
    _log(candidate, [(2, "candidate", 0.75)], CANDIDATE, "3")
    none, cursor = second.read(stable, candidate, CANDIDATE, cursor)
    assert none == (), "whether the first of them has counted these isn't known to the second"
    _log(stable, [(4, "stable", 0.25)], STABLE, "4")
    _log(candidate, [(4, "candidate", 0.75)], CANDIDATE, "5")
    counted, cursor = second.read(stable, candidate, CANDIDATE, cursor)
    assert counted == (0.5,)
    assert not first.knows(cursor)
    assert first.read(stable, candidate, CANDIDATE, cursor)[0] == (), "back at the first one: what waits there is of yesterday"


def test_differences_that_met_no_look_come_again_once_whatever_becomes_of_the_status(tmp_path: Path) -> None:
    stable, candidate, reader = tmp_path / "s", tmp_path / "c", ScoresAcross()
    _, cursor = reader.read(stable, candidate, CANDIDATE, {})
    _log(stable, [(1, "stable", 0.5)], STABLE, "1")
    _log(candidate, [(1, "candidate", 0.75)], CANDIDATE, "2")
    found, after = reader.read(stable, candidate, CANDIDATE, cursor)
    reader.give_back(found)
    assert reader.read(stable, candidate, CANDIDATE, cursor)[0] == (0.25,), "that status was not written: they are read again"
    reader.give_back(found)
    found, later = reader.read(stable, candidate, CANDIDATE, after)
    assert found == (0.25,), "with the next look"
    assert later != after, "without any new file"
    assert reader.read(stable, candidate, CANDIDATE, after)[0] == (0.25,), "its status was not written"
    assert reader.read(stable, candidate, CANDIDATE, later)[0] == (), "it was"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    kinds=st.sampled_from(["pairs", "across"]),
    moves=st.lists(st.tuples(
        st.sampled_from(["stable", "candidate", "both", "nothing"]),
        st.sampled_from(["written", "written", "lost", "no look", "no look and lost", "restart"])), min_size=5, max_size=25))
def test_whatever_is_lost_between_log_and_status_no_score_counts_twice(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, moves: list[tuple[str, str]],
) -> None:
    folder = tmp_path_factory.mktemp("log")
    stable, candidate = folder / "s", folder / "c"

    def reader() -> ScorePairs | ScoresAcross:
        return ScorePairs() if kinds == "pairs" else ScoresAcross()

    now, cursor, counted = reader(), dict[str, Any](), list[float]()
    _, cursor = now.read(stable, candidate, CANDIDATE, cursor)
    at = {"stable": 0, "candidate": 0}
    for number, (logs, fate) in enumerate(moves):
        for arm in ("stable", "candidate"):
            if logs in (arm, "both"):
                at[arm] += 1
                time = at[arm]
                mark = "stable" if arm == "stable" else "shadow" if kinds == "pairs" else "candidate"
                rows = [(time, mark, 0.0)] * (1 if kinds == "pairs" else 50) if arm == "stable" else [(time, mark, time / 1024)]
                _log(stable if arm == "stable" else candidate, rows, STABLE if arm == "stable" else CANDIDATE, f"{number:04d}{arm}",
                     ids=[f"{time}-{i}" for i in range(len(rows))])
        if fate == "restart":
            now = reader()
        found, after = now.read(stable, candidate, CANDIDATE, json.loads(json.dumps(cursor)))
        if fate.startswith("no look"):
            now.give_back(found)
        elif fate != "lost":
            counted += found
        if not fate.endswith("lost"):
            cursor = after
    assert len(counted) == len(set(counted)), "every candidate's score is another one, and stable's are all zero"
    if not any(f == "restart" for _, f in moves):
        found, _ = now.read(stable, candidate, CANDIDATE, cursor)
        assert sorted([*counted, *found]) == [t / 1024 for t in range(1, min(at.values()) + 1)], "nor is any lost"
