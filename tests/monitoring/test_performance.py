"""Performance from late labels: metrics against scikit-learn, and when nothing may be said."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from hafnium_contract.bundle import REQUIRED, Bundle, write_bundle
from hafnium_contract.evidence import EvidenceSpec
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.kept_rows import LabelledSample
from hafnium_monitoring.performance import Interval, PerformanceOptions, difference, measure, run_performance

from .conftest import NOW, START, Matrix, write_log

ROWS = 4_000
Judge = Callable[..., EvidenceSpec]


def test_metrics_agree_with_scikit_learn_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(3_000) < 0.1).astype(np.float64)
    score = np.round(np.clip(rng.normal(0.3 + 0.2 * truth, 0.15), 0, 1), 2)
    found = measure(score, truth, confidence=0.95, resamples=100, seed=0)
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(truth, score))
    assert found["pr_auc"].value == pytest.approx(average_precision_score(truth, score))
    assert found["brier"].value == pytest.approx(brier_score_loss(truth, score))
    for x in found.values():
        assert x.lower < x.value < x.upper


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(120):
        truth = (rng.random(800) < 0.2).astype(np.float64)
        score = 1 / (1 + np.exp(-rng.normal(truth, 1.0)))  # AUC of N(1,1) over N(0,1) is Φ(1/√2) = 0.7602
        x = measure(score, truth, confidence=0.95, resamples=150, seed=i)["roc_auc"]
        hits += x.lower <= 0.76025 <= x.upper
    assert hits >= 105


@pytest.fixture
def judged(tmp_path: Path, contract: ModelContract, candidate_bundle: Bundle, population: Matrix) -> Judge:
    """Runs over a window whose labels follow the scores; `truth(score, rng)` may make them worse."""
    number = itertools.count()

    def run(
        baseline: float | None = 0.75, skill: float = 4.0, known_after: timedelta = timedelta(days=20), csv: bool = False,
        hide: float = 0.0, within: float = 0.005, pr_auc: float | None = None, share: float | None = 0.06, **options: object,
    ) -> EvidenceSpec:
        metrics = {} if baseline is None else {"rocAuc": {"value": baseline, "lower": baseline - within, "upper": baseline + within}}
        metrics |= {} if pr_auc is None else {"prAuc": {"value": pr_auc, "lower": pr_auc - 0.01, "upper": pr_auc + 0.01}}
        counts = {} if share is None else {"data": {"parts": {"test": {"rows": 10_000, "positives": round(10_000 * share)}}}}
        files = {name: (candidate_bundle.path / name).read_bytes() for name in REQUIRED}
        files["evaluation.json"] = json.dumps({"schemaVersion": 1, "metrics": metrics} | counts).encode()
        bundle = write_bundle(
            tmp_path / f"bundle-{next(number)}", files, contract=contract, model_version="5", data_digest="sha256:" + "0" * 64,
            git_commit="0" * 40, seed=0, opset=20,
        )
        log = tmp_path / f"log-{next(number)}"
        written = write_log(log, bundle, population[:ROWS], "stable", files=1)
        score = pq.ParquetFile(written[0]).read()["score"].to_numpy()
        rng = np.random.default_rng(0)
        rank = score.argsort().argsort() / ROWS
        truth = (rng.random(ROWS) < 0.3 * rank**skill).astype(np.int8)
        keep = rng.random(ROWS) >= hide
        table = pa.table({
            "transaction_id": pa.array([f"r-{i}" for i in range(ROWS)]).filter(pa.array(keep)), "is_fraud": truth[keep],
            "label_time": pa.array([START + known_after] * int(keep.sum()), pa.timestamp("us", tz="UTC")),
        })
        labels = tmp_path / ("labels.csv" if csv else "labels.parquet")
        pyarrow.csv.write_csv(table, labels) if csv else pq.write_table(table, labels)
        chosen = PerformanceOptions(bundle=bundle.path, logs=(log,), labels=labels, start=START, end=NOW, resamples=100)
        return run_performance(replace(chosen, **options), START + timedelta(days=60))  # type: ignore[arg-type]
    return run


def test_a_model_as_good_as_evaluated_passes(judged: Judge) -> None:
    spec = judged()
    assert (spec.kind, spec.verdict, spec.samples) == ("performance", "Pass", ROWS)
    assert {v.statistic for v in spec.values} >= {"roc_auc", "roc_auc_lower", "pr_auc", "brier"}


def test_a_model_that_became_worse_fails(judged: Judge) -> None:
    spec = judged(baseline=0.99)
    assert spec.verdict == "Fail"
    assert "roc_auc" in spec.message


def test_an_interval_around_the_limit_is_inconclusive(judged: Judge) -> None:
    good = next(v.value for v in judged().values if v.statistic == "roc_auc")
    spec = judged(baseline=good / 0.98)
    assert spec.verdict == "Inconclusive"
    assert "intervals still contain" in spec.message


def test_labels_that_are_not_known_yet_are_no_data(judged: Judge) -> None:
    spec = judged(known_after=timedelta(days=90))
    assert (spec.verdict, spec.samples) == ("NoData", 0)
    assert "have a label by now" in spec.message


def test_labels_of_a_part_only_are_no_data_since_fraud_is_known_first(judged: Judge) -> None:
    assert judged(hide=0.3).verdict == "NoData"


def test_labels_may_come_as_csv(judged: Judge) -> None:
    assert judged(csv=True).verdict == "Pass"


def test_a_bundle_without_metrics_is_inconclusive(judged: Judge) -> None:
    assert judged(baseline=None).verdict == "Inconclusive"


def test_a_missing_label_file_is_error_evidence(judged: Judge, tmp_path: Path) -> None:
    spec = judged(labels=tmp_path / "absent.parquet")
    assert spec.verdict == "Error"
    assert "absent.parquet" in spec.message


def test_too_few_frauds_are_no_data(judged: Judge) -> None:
    assert "positive labels" in judged(positives_min=3_000).message


def test_an_evaluation_on_few_frauds_fails_nobody_by_its_own_chance(judged: Judge) -> None:
    assert judged(baseline=0.93, within=0.01).verdict == "Fail"
    spec = judged(baseline=0.93, within=0.2)
    assert spec.verdict == "Inconclusive"
    assert "[0.730, 1.130]" in spec.message


def test_an_evaluation_without_interval_counts_as_exact_and_the_message_says_so(judged: Judge) -> None:
    assert "taken as exact" in judged(within=0.0).message


def test_pr_auc_is_compared_at_the_evaluations_share_of_frauds(judged: Judge) -> None:
    def pr_auc(spec: EvidenceSpec) -> float:
        return next(v.value for v in spec.values if v.statistic == "pr_auc")

    at_3, at_12 = pr_auc(judged(share=0.03)), pr_auc(judged(share=0.12))
    assert at_12 > at_3 + 0.05
    assert judged(pr_auc=at_3, share=0.03).verdict != "Fail"
    assert judged(pr_auc=at_12, share=0.03).verdict == "Fail"
    assert judged(pr_auc=at_12, share=None).verdict == "Pass"  # without its share it is shown and not judged


def test_weighting_to_a_share_is_as_if_negatives_had_been_repeated() -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(2_000) < 0.2).astype(np.float64)
    score = np.clip(rng.normal(0.3 + 0.2 * truth, 0.15), 0, 1)
    thrice = np.concatenate([np.arange(2_000), *[np.flatnonzero(truth == 0)] * 2])
    share = truth.sum() / len(thrice)
    found = measure(score, truth, confidence=0.95, resamples=2, seed=0, share=float(share))
    assert found["pr_auc"].value == pytest.approx(average_precision_score(truth[thrice], score[thrice]))
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(truth, score))


def test_the_limits_of_a_difference_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(2_000):
        a, b = rng.normal(0.8, 0.01), rng.normal(0.7, 0.02)
        x = difference(Interval(a, a - 0.0196, a + 0.0196), Interval(b, b - 0.0392, b + 0.0392), 0.98, 0.95)
        hits += x.lower <= 0.8 - 0.98 * 0.7 <= x.upper
    assert 0.935 < hits / 2_000 < 0.965


def test_no_fraud_is_left_out_of_a_window_with_more_rows_than_fit(judged: Judge) -> None:
    def numbers(spec: EvidenceSpec) -> dict[str, float]:
        return {v.statistic: v.value for v in spec.values}

    whole = judged()
    frauds = round(0.3 * ROWS / 5)
    one = judged(rows_max=1_000)
    assert one.samples == pytest.approx(1_000 + frauds, abs=50)
    found = [numbers(judged(rows_max=1_000, seed=seed)) for seed in range(6)]
    for metric, width in (("roc_auc", 0.01), ("pr_auc", 0.01), ("brier", 0.01)):
        assert np.mean([f[metric] for f in found]) == pytest.approx(numbers(whole)[metric], abs=width)
    assert one.verdict == whole.verdict == "Pass"


def test_labels_of_a_part_only_are_no_data_also_when_all_frauds_of_it_are_kept(judged: Judge) -> None:
    spec = judged(hide=0.3, rows_max=1_000)
    assert spec.verdict == "NoData"
    labelled, _, asked = spec.message.split()[:3]
    assert int(asked) == pytest.approx(ROWS, abs=1)
    assert int(labelled) == pytest.approx(0.7 * ROWS, abs=150)


def test_a_weight_is_as_if_a_row_had_been_there_so_often() -> None:
    rng = np.random.default_rng(5)
    truth = (rng.random(2_000) < 0.2).astype(np.float64)
    score = np.round(np.clip(rng.normal(0.3 + 0.2 * truth, 0.15), 0, 1), 2)
    weight = rng.integers(1, 4, 2_000).astype(np.float64)
    often = np.repeat(np.arange(2_000), weight.astype(np.int64))
    one, other = (measure(s, t, w, confidence=0.95, resamples=2, seed=0) for s, t, w in (
        (score, truth, weight), (score[often], truth[often], None)))
    assert {m: x.value for m, x in one.items()} == pytest.approx({m: x.value for m, x in other.items()})


def test_the_interval_of_a_sample_covers_the_truth_about_as_often_as_it_says() -> None:
    """Windows of 30,000 rows with 1 % frauds, of which 2,000 are kept beside the frauds."""
    rng = np.random.default_rng(6)
    shift, share, rows = 2.0, 0.01, 30_000
    precisely = rng.normal(0, 1, 2_000_000)
    of_many = np.arange(2_000_000) < share * 2_000_000
    true_pr = average_precision_score(of_many, precisely + shift * of_many)
    hits = {"roc_auc": 0, "pr_auc": 0}
    for i in range(100):
        truth = (rng.random(rows) < share).astype(np.float64)
        score = rng.normal(0, 1, rows) + shift * truth
        table = pa.table({"request_id": [str(n) for n in range(rows)], "score": score, "truth": truth})
        suspected = [str(n) for n in np.flatnonzero(truth)]
        sample = LabelledSample(2_000, rng, partial(pa.array, suspected))
        for start in range(0, rows, 1_700):
            sample.add(table.slice(start, 1_700))
        kept = sample.kept()
        every = pa.concat_tables(t for t, _ in kept)
        weight = np.repeat([w for _, w in kept], [len(t) for t, _ in kept])
        assert weight.sum() == pytest.approx(rows)
        found = measure(
            every["score"].to_numpy(), every["truth"].to_numpy(), weight, confidence=0.95, resamples=150, seed=i, share=share)
        hits["roc_auc"] += found["roc_auc"].lower <= 0.921350 <= found["roc_auc"].upper  # Φ(2/√2)
        hits["pr_auc"] += found["pr_auc"].lower <= true_pr <= found["pr_auc"].upper
    assert min(hits.values()) >= 88, hits
