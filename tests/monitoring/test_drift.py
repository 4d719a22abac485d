"""Drift runs over real bundles and logs: what fails a candidate, what doesn't, and what is not known."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hafnium_contract.bundle import REQUIRED, write_bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.errors import BundleError, InputError
from hafnium_contract.evidence import EvidenceValue, read_evidence, write_evidence
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.drift import Arm, DriftOptions, DriftOutcome, compare_arms, run_drift
from hafnium_monitoring.samples import Sample, Season, load_reference, match_season
from hafnium_monitoring.settings import DriftRules
from hafnium_monitoring.verdict import judge
from hafnium_testing import make_bundle, synthetic_matrix

from .conftest import NOW, START, Change, World, change, write_log

AMOUNT_IN_CENTS = change("transaction_amount", lambda v: np.minimum(v * 100, 100_000))
STUCK = change("geo_risk_score", lambda v: np.full_like(v, 0.5))
DOUBLED = change("amount_mean_30d", lambda v: v * 3)


def some_missing(share: float) -> object:
    return change("velocity_24h", lambda v: np.where(np.arange(len(v)) % round(1 / share) == 0, np.nan, v).astype(np.float32))


def drifted(outcome: DriftOutcome, compared_with: str) -> set[str]:
    return {v.name for v in outcome.evidence.values if v.drifted and v.compared_with == compared_with}


def value(outcome: DriftOutcome, name: str, compared_with: str = "reference") -> EvidenceValue:
    return next(v for v in outcome.evidence.values if v.name == name and v.compared_with == compared_with)


@pytest.mark.parametrize("arm", ["shadow", "candidate"])
def test_equal_arms_pass_with_a_value_for_every_feature(world: World, arm: str) -> None:
    world.log(arm, 2_000)
    world.log("stable", 4_000)
    outcome = world.run()
    spec = outcome.evidence
    assert (spec.verdict, spec.samples, spec.both_arms) == ("Pass", 2_000, False)
    assert (spec.window_start, spec.window_end, spec.created_at) == (START, NOW, NOW)
    assert spec.model_digest == world.candidate.manifest.digest
    judged = {f.name for f in world.contract.inputs if not f.personal and f.drift.test == "psi"} | {"score"}
    assert {v.name for v in spec.values if v.statistic == "psi" and v.compared_with == "stable"} == judged
    assert value(outcome, "transaction_amount").threshold == 0.1
    assert value(outcome, "score", "stable").p_value is None  # two models score differently by design: shown, not judged


@pytest.mark.parametrize(
    ("fault", "name"), [(AMOUNT_IN_CENTS, "transaction_amount"), (STUCK, "geo_risk_score"), (DOUBLED, "amount_mean_30d")],
    ids=["unit times 100", "stuck feed", "a mean three times as large"],
)
def test_a_fault_in_the_candidates_features_alone_fails_it(world: World, fault: object, name: str) -> None:
    world.log("candidate", 1_000, fault)  # type: ignore[arg-type]
    world.log("stable", 8_000)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert name in drifted(outcome, "stable")
    assert name in outcome.evidence.message


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_missing_values_count_though_evidently_drops_them(world: World, share: float) -> None:
    world.log("candidate", 1_000, some_missing(share))  # type: ignore[arg-type]
    world.log("stable", 4_000)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert "missing:velocity_24h" in drifted(outcome, "stable")
    assert value(outcome, "missing:velocity_24h", "stable").value == pytest.approx(share, abs=0.03)


def test_unknown_categories_of_the_candidate_fail_it(world: World) -> None:
    world.log("candidate", 1_000, change("channel", lambda v: np.where(np.arange(len(v)) % 10 == 0, -1, v).astype(np.float32)))
    world.log("stable", 4_000)
    assert "unknown:channel" in drifted(world.run(), "stable")


def test_more_degraded_answers_than_the_stable_arm_fail_the_candidate(world: World) -> None:
    world.log("candidate", 1_000, degraded=0.2)
    world.log("stable", 4_000, degraded=0.01)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert drifted(outcome, "stable") == {"degraded"}


def test_drift_on_both_arms_is_the_world_and_holds(world: World) -> None:
    world.log("candidate", 2_000, AMOUNT_IN_CENTS, STUCK)
    world.log("stable", 8_000, AMOUNT_IN_CENTS, STUCK)
    outcome = world.run()
    assert (outcome.evidence.verdict, outcome.evidence.both_arms) == ("Inconclusive", True)
    assert "the world changed" in outcome.evidence.message
    assert {"transaction_amount", "geo_risk_score"} <= drifted(outcome, "reference")
    assert "stable:transaction_amount" in drifted(outcome, "reference")
    assert drifted(outcome, "stable") == set()


def test_a_candidate_that_drifted_further_than_the_world_fails(world: World) -> None:
    world.log("candidate", 2_000, STUCK, AMOUNT_IN_CENTS)
    world.log("stable", 8_000, STUCK)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert drifted(outcome, "stable") == {"transaction_amount"}  # not the feed that is stuck for both


def test_a_candidate_trained_on_other_units_fails_although_both_arms_see_the_same(
    world: World, tmp_path: Path, contract: ModelContract,
) -> None:
    # The candidate's reference is in another unit: nothing differs between the arms, and stable is where it was.
    table = pq.ParquetFile(world.candidate.path / "reference.parquet").read()
    column = table.column_names.index("feature_transaction_amount")
    table = table.set_column(column, "feature_transaction_amount", pa.array(table[column].to_numpy() / 100, pa.float32()))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    files = {name: (world.candidate.path / name).read_bytes() for name in REQUIRED} | {"reference.parquet": sink.getvalue()}
    world.candidate = write_bundle(
        tmp_path / "cents", files, contract=contract, model_version="3", data_digest="sha256:" + "0" * 64, git_commit="0" * 40,
        seed=0, opset=20,
    )
    world.log("shadow", 2_000)
    world.log("stable", 2_000)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert drifted(outcome, "stable") == set()
    assert "not what the candidate was" in outcome.evidence.message


def test_a_model_on_its_own_fails_when_it_leaves_its_reference(world: World) -> None:
    write_log(world.logs[0], world.candidate, world.matrix(2_000, AMOUNT_IN_CENTS), "stable")
    assert world.run(alone=True).evidence.verdict == "Fail"


def test_a_model_on_its_own_passes_whatever_its_arm(world: World) -> None:
    write_log(world.logs[0], world.candidate, world.matrix(800), "stable", ids="a")
    write_log(world.logs[0], world.candidate, world.matrix(800), "candidate", ids="b")
    spec = world.run(alone=True).evidence
    assert (spec.verdict, spec.samples) == ("Pass", 1_600)


@pytest.mark.parametrize("changes", [(), (AMOUNT_IN_CENTS,)], ids=["like its reference", "off its reference"])
def test_a_stable_arm_with_too_few_rows_is_no_data_whatever_the_candidate_looks_like(world: World, changes: tuple[Change, ...]) -> None:
    world.log("candidate", 2_000, *changes, degraded=1.0)
    world.log("stable", 100)
    spec = world.run().evidence
    assert (spec.verdict, spec.both_arms, spec.samples) == ("NoData", False, 2_000)
    assert "the stable arm has too few rows in the window (100)" in spec.message
    assert ("transaction_amount" in spec.message) == bool(changes)


@pytest.mark.parametrize(("changes", "verdict"), [((), "Pass"), ((AMOUNT_IN_CENTS,), "Fail")], ids=["equal arms", "a unit fault"])
def test_a_gateway_that_marks_every_row_stable_hides_no_candidate(world: World, changes: tuple[Change, ...], verdict: str) -> None:
    """KServe's canary, or a gateway that can't set headers per backend: one log, and the model says which arm a row is of."""
    write_log(world.logs[0], world.candidate, world.matrix(5_000, *changes), "stable", ids="new")
    write_log(world.logs[0], world.stable, world.matrix(20_000), "stable", ids="old")
    spec = world.run().evidence
    assert (spec.verdict, spec.samples) == (verdict, 5_000), spec.message


def test_the_stable_models_shadow_copies_are_not_its_answers(world: World) -> None:
    world.log("candidate", 2_000)
    write_log(world.logs[1], world.stable, world.matrix(4_000), "shadow")
    spec = world.run().evidence
    assert spec.verdict == "NoData"
    assert "the stable arm has too few rows in the window (0)" in spec.message


def test_one_model_in_both_arms_is_told_apart_by_its_mark(world: World) -> None:
    world.candidate = world.stable
    world.log("candidate", 2_000)
    world.log("stable", 4_000)
    spec = world.run().evidence
    assert (spec.verdict, spec.samples) == ("Pass", 2_000)


def test_a_candidate_with_all_the_traffic_needs_no_stable_rows(world: World) -> None:
    world.log("candidate", 2_000)
    assert world.run().evidence.verdict == "NoData"
    assert world.run(all_traffic=True).evidence.verdict == "Pass"
    world.log("candidate", 2_000, AMOUNT_IN_CENTS)
    assert world.run(all_traffic=True).evidence.verdict == "Inconclusive"


def test_a_log_that_is_not_there_is_no_data_that_names_it(world: World) -> None:
    spec = world.run().evidence
    assert spec.verdict == "NoData"
    assert all(str(log) in spec.message for log in world.logs)
    world.log("candidate", 2_000)
    assert f"no such log: {world.logs[1]}" in world.run().evidence.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("alone", "stable_rows"), [(True, 0), (False, 0), (False, 2_000)], ids=["alone", "no stable rows", "two arms"])
def test_a_single_score_that_is_no_number_fails_and_is_counted(world: World, value: float, alone: bool, stable_rows: int) -> None:
    write_log(world.logs[0], world.candidate, world.matrix(2_000), "candidate", files=1)
    log = next(world.logs[0].glob("date=*/*/part-*.parquet"))
    rows = pq.ParquetFile(log).read()
    scores = rows["score"].to_numpy().copy()
    scores[7] = value
    at = rows.column_names.index("score")
    pq.write_table(rows.set_column(at, rows.schema.field("score"), pa.array(scores, pa.float32(), from_pandas=False)), log)
    if stable_rows:
        world.log("stable", stable_rows)
    spec = world.run(alone=alone).evidence
    assert spec.verdict == "Fail"
    assert "scores that are NaN or infinite: 1" in spec.message


def test_a_tiny_reference_is_an_error_and_never_no_drift(world: World, tmp_path: Path, contract: ModelContract) -> None:
    world.candidate = make_bundle(tmp_path / "tiny", contract, version="8", rows=100)
    write_log(world.logs[0], world.candidate, world.matrix(5_000, AMOUNT_IN_CENTS), "candidate")
    spec = world.run(alone=True).evidence
    assert (spec.verdict, spec.values) == ("Error", ())
    assert "the reference has 100 rows, 1000 are needed" in spec.message


def test_a_feature_that_the_reference_hardly_knows_is_drift_when_it_arrives(
    world: World, tmp_path: Path, contract: ModelContract,
) -> None:
    whole = pq.ParquetFile(world.candidate.path / "reference.parquet").read()
    at = whole.column_names.index("feature_geo_risk_score")
    hardly = whole["feature_geo_risk_score"].to_numpy().copy()
    hardly[20:] = np.nan
    files = {name: (world.candidate.path / name).read_bytes() for name in REQUIRED}
    pq.write_table(whole.set_column(at, whole.column_names[at], pa.array(hardly, pa.float32())), tmp_path / "reference.parquet")
    files["reference.parquet"] = (tmp_path / "reference.parquet").read_bytes()
    world.candidate = write_bundle(
        tmp_path / "hardly", files, contract=contract, model_version="8", data_digest="sha256:" + "0" * 64, git_commit="0" * 40,
        seed=0, opset=20,
    )
    world.log("candidate", 2_000)
    outcome = world.run(alone=True)
    assert outcome.evidence.verdict == "Fail"
    assert "missing:geo_risk_score" in drifted(outcome, "reference")


def test_too_few_rows_are_no_data(world: World) -> None:
    world.log("candidate", 999)
    world.log("stable", 4_000)
    spec = world.run().evidence
    assert (spec.verdict, spec.samples, spec.values) == ("NoData", 999, ())


def test_rows_of_another_digest_are_not_counted(world: World) -> None:
    write_log(world.logs[0], world.candidate, world.matrix(4_000), "candidate", digest="sha256:" + "ab" * 32)
    world.log("stable", 4_000)
    assert (world.run().evidence.verdict, world.run().evidence.samples) == ("NoData", 0)


def test_the_clock_is_not_drift_in_a_window_shorter_than_a_day(world: World) -> None:
    at_three = change("hour_of_day", lambda v: np.full_like(v, 3.0))
    world.log("candidate", 2_000, at_three)
    world.log("stable", 4_000, at_three)
    assert world.run().evidence.verdict == "Pass"


@pytest.mark.parametrize("hour", [3, 12], ids=["night", "noon"])
def test_a_model_alone_is_judged_by_the_same_hours_of_its_reference(world: World, contract: ModelContract, hour: int) -> None:
    """Amounts at night are a third of those at noon, every night: no drift; the same fall at noon is."""
    rng = np.random.default_rng(2)
    of_day = np.cos((np.arange(24) - 13) / 24 * 2 * np.pi) + 1.1

    def at(hours: np.ndarray) -> Sample:  # type: ignore[type-arg]
        rows = rng.integers(0, 5_000, len(hours))
        features = {n: v[rows] for n, v in load_reference(world.candidate).features.items()}
        features["hour_of_day"] = hours.astype(np.float32)
        scale = np.where(hours < 6, 1.0, 3.0)
        features["transaction_amount"] = (rng.lognormal(3, 1, len(hours)) * scale).astype(np.float32)
        return Sample(len(hours), features, rng.random(len(hours), np.float32), np.zeros(len(hours), np.bool_))

    reference = replace(at(rng.choice(24, 5_000, p=of_day / of_day.sum())), degraded=None)
    window = at(np.full(1_500, hour))
    lower = dict(window.features, transaction_amount=window.features["transaction_amount"] / 3)
    for seen, verdict in ((window, "Pass"), (replace(window, features=lower), "Fail")):
        season = match_season(contract, reference, seen, START, NOW, 1_000)
        assert season.matched
        assert judge(compare_arms(Arm(contract, seen, season), None, world.rules, stable_expected=False)).verdict == verdict


def test_a_candidate_whose_clock_is_wrong_still_fails(world: World) -> None:
    world.log("candidate", 2_000, change("hour_of_day", lambda v: (v + 5) % 24))
    world.log("stable", 4_000)
    assert "hour_of_day" in drifted(world.run(), "stable")


def test_garbage_in_the_log_is_error_evidence_and_not_no_drift(world: World) -> None:
    world.log("candidate", 2_000)
    world.log("stable", 2_000)
    next(world.logs[0].glob("date=*/*/part-*.parquet")).write_bytes(b"PAR1 torn")
    outcome = world.run()
    assert outcome.evidence.verdict == "Error"
    assert "part-" in outcome.evidence.message
    assert outcome.evidence.values == ()


def test_a_changed_bundle_is_error_evidence_about_the_expected_digest(
    world: World, tmp_path: Path, contract: ModelContract,
) -> None:
    broken = make_bundle(tmp_path / "broken", contract, version="9", rows=500)
    (broken.path / "reference.parquet").write_bytes(b"other")
    options = DriftOptions(bundle=broken.path, logs=world.logs, start=START, end=NOW, expect_digest=broken.manifest.digest)
    spec = run_drift(options, NOW).evidence
    assert (spec.verdict, spec.model_digest) == ("Error", broken.manifest.digest)
    with pytest.raises(BundleError):
        run_drift(DriftOptions(bundle=broken.path, logs=world.logs, start=START, end=NOW), NOW)


def test_another_bundle_in_the_stable_models_place_is_error_evidence(world: World, tmp_path: Path, contract: ModelContract) -> None:
    world.log("candidate", 2_000, degraded=1.0)
    world.log("stable", 2_000)
    digest = world.stable.manifest.digest
    assert world.run(expect_stable_digest=digest).evidence.verdict == "Fail"
    world.stable = make_bundle(tmp_path / "other", contract, version="7", rows=500)
    spec = world.run(expect_stable_digest=digest).evidence
    assert (spec.verdict, spec.model_digest) == ("Error", world.candidate.manifest.digest)
    assert digest in spec.message


def test_a_window_without_zone_or_backwards_is_refused(world: World) -> None:
    for start, end in ((NOW, START), (START.replace(tzinfo=None), NOW.replace(tzinfo=None))):
        with pytest.raises(InputError, match="window"):
            run_drift(DriftOptions(bundle=world.candidate.path, logs=world.logs, start=start, end=end), NOW)


def test_evidence_goes_through_the_file_and_back(world: World, tmp_path: Path) -> None:
    world.log("candidate", 2_000, AMOUNT_IN_CENTS)
    world.log("stable", 2_000)
    spec = world.run().evidence
    write_evidence(tmp_path / "evidence", spec)
    assert [e.spec for e in read_evidence(tmp_path / "evidence") if not isinstance(e, Exception)] == [spec]


def test_every_column_missing_is_drift_and_not_an_error(world: World) -> None:
    world.log("candidate", 2_000, change("geo_risk_score", lambda v: np.full_like(v, np.nan)))
    world.log("stable", 2_000)
    outcome = world.run()
    assert outcome.evidence.verdict == "Fail"
    assert value(outcome, "missing:geo_risk_score", "stable").value > 0.9


def test_one_window_of_equal_arms_in_a_shifted_world_never_fails(world: World, contract: ModelContract) -> None:
    """Forty A/A windows of 500 rows at 5 %, in a world whose amounts grew by half: holds are allowed, a Fail is not."""
    rules = DriftRules(looks=10, min_rows=500)
    pool = synthetic_matrix(contract, 20_000, seed=9)
    amount = contract.input_names.index("transaction_amount")
    pool[:, amount] *= 1.5
    reference = load_reference(world.candidate)
    rng = np.random.default_rng(0)

    def arm(rows: int) -> Arm:
        drawn = pool[rng.integers(0, len(pool), rows)]
        features = {n: drawn[:, contract.input_names.index(n)] for n in reference.features}
        score = np.clip(drawn[:, amount] / 1e5, 0, 1)
        sample = Sample(rows, features, score, np.zeros(rows, np.bool_))
        base = replace(reference, score=np.clip(reference.features["transaction_amount"] / 1e5, 0, 1))
        return Arm(contract, sample, Season(base, False, frozenset({"hour_of_day"})))

    verdicts = [judge(compare_arms(arm(500), arm(9_500), rules, stable_expected=True)).verdict for _ in range(40)]
    assert set(verdicts) <= {"Pass", "Inconclusive"}


def test_the_same_rows_give_the_same_evidence(world: World) -> None:
    world.log("candidate", 3_000)
    world.log("stable", 3_000)
    world.rules = DriftRules(looks=10, rows_max=1_500)
    assert world.run().evidence == world.run().evidence
    assert world.run().evidence.samples == 3_000


def test_a_window_of_days_compares_the_clock_as_well(world: World) -> None:
    at_three = change("hour_of_day", lambda v: np.full_like(v, 3.0))
    world.log("candidate", 2_000, at_three)
    world.log("stable", 4_000, at_three)
    options = DriftOptions(
        bundle=world.candidate.path, logs=world.logs, start=START - timedelta(days=2), end=NOW, stable_bundle=world.stable.path,
        rules=world.rules,
    )
    outcome = run_drift(options, NOW)
    assert (outcome.evidence.verdict, outcome.evidence.both_arms) == ("Inconclusive", True)
    assert "hour_of_day" in drifted(outcome, "reference")


def test_arms_whose_split_changed_inside_the_window_are_not_compared(world: World) -> None:
    # The weight rose in the middle: the candidate has the second half only, when amounts had grown for everyone.
    write_log(world.logs[0], world.candidate, world.matrix(2_000, DOUBLED), "candidate", start=START + timedelta(minutes=30),
              seconds=1_800)
    write_log(world.logs[1], world.stable, world.matrix(2_000), "stable", seconds=1_800, ids="a")
    write_log(world.logs[1], world.stable, world.matrix(2_000, DOUBLED), "stable", start=START + timedelta(minutes=30),
              seconds=1_800, ids="b")
    spec = world.run().evidence
    assert (spec.verdict, spec.both_arms) == ("Inconclusive", False)
    assert "at different times" in spec.message


def test_another_contract_over_other_data_works_the_same(tmp_path: Path) -> None:
    contract = load_contract(Path(__file__).parents[2] / "examples" / "creditcard" / "contract.yaml")
    stable = make_bundle(tmp_path / "stable", contract, version="1", seed=1, rows=3_000)
    candidate = make_bundle(tmp_path / "candidate", contract, version="2", seed=2, rows=3_000)
    pool = np.random.default_rng(0).permutation(synthetic_matrix(contract, 6_000, seed=8))
    world = World(tmp_path, contract, pool, stable, candidate)
    world.log("shadow", 1_500)
    world.log("stable", 1_500)
    assert world.run().evidence.verdict == "Pass"
    first = contract.input_names[0]
    world.log("shadow", 1_500, change(first, lambda v: v * 0 + 1))
    assert first in drifted(world.run(), "stable")
