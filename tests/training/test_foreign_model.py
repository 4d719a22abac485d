"""Any ONNX that fits a contract becomes a bundle, whatever trained it, and is judged like one of our own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from hafnium_servers import predictor
from hafnium_training_cases import LENDER, lender, lender_table
from hafnium_trees import tree_model
from onnx import TensorProto, helper
from prometheus_client import CollectorRegistry
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from typer.testing import CliRunner

from hafnium_contract.bundle import open_bundle
from hafnium_contract.contract_file import parse_contract
from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import BundleError, InputError
from hafnium_local.__main__ import app
from hafnium_predictor.engine import load_engine
from hafnium_predictor.metrics import PredictorMetrics
from hafnium_training.dataset import Dataset, dataset_of
from hafnium_training.foreign_model import ForeignOptions, make_bundle_of
from hafnium_training.gates import GatesFailed

DIRECTIONS = {"increasing": 1, "decreasing": -1, "none": 0}
NO_DIRECTIONS: dict[str, Any] = {**LENDER, "features": [{**f, "monotone": "none"} for f in LENDER["features"]]}


@dataclass(frozen=True)
class Case:
    options: ForeignOptions
    train: Dataset
    test: Dataset


def case(folder: Path, document: dict[str, Any]) -> Case:
    """A contract, and held-out rows in a file; the model is still to be written."""
    folder.mkdir(exist_ok=True)
    contract = parse_contract(document)
    frame = lender_table(rows=4000, seed=3)
    train, test = frame.iloc[:2800], frame.iloc[2800:]
    (folder / "contract.yaml").write_text(json.dumps(document), encoding="utf-8")
    test.to_csv(folder / "held-out.csv", index=False)
    options = ForeignOptions(
        folder / "model.onnx", folder / "contract.yaml", folder / "held-out.csv", folder / "bundle", "Trained by the tests.", version="t1",
    )
    return Case(options, dataset_of(train, contract), dataset_of(test, contract))


@pytest.fixture(scope="module")
def boosted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, HistGradientBoostingClassifier]:
    found = case(tmp_path_factory.mktemp("boosted"), LENDER)
    model = HistGradientBoostingClassifier(
        max_iter=60, max_leaf_nodes=8, min_samples_leaf=40, random_state=0, early_stopping=False,
        monotonic_cst=[DIRECTIONS[f.monotone] for f in lender().inputs],
    ).fit(found.train.X, found.train.y)
    found.options.model.write_bytes(tree_model(model, 6))
    return found, model


@pytest.fixture(scope="module")
def bundled(boosted: tuple[Case, HistGradientBoostingClassifier]) -> Path:
    return make_bundle_of(boosted[0].options)[0].path


def scores(bundle: Path, X: Matrix) -> tuple[Matrix, Matrix]:
    """By the predictor's own engine."""
    return load_engine(bundle, PredictorMetrics("m", CollectorRegistry()), rows_max=5000, warmup_rows=8).run(X)


def test_boosted_trees_in_the_predictor_give_scikit_learn_s_probabilities(
    boosted: tuple[Case, HistGradientBoostingClassifier], bundled: Path,
) -> None:
    found, model = boosted
    X = found.test.X
    assert np.isnan(X).any()
    score, interval = scores(bundled, X)
    np.testing.assert_allclose(score, model.predict_proba(X)[:, 1], atol=1e-6)
    assert (interval[:, 0] <= score).all()
    assert (score <= interval[:, 1]).all()


@pytest.mark.slow
def test_boosted_trees_behind_the_real_server(
    boosted: tuple[Case, HistGradientBoostingClassifier], bundled: Path, tmp_path: Path,
) -> None:
    found, model = boosted
    X = found.test.X[:40]
    rows = [[None if np.isnan(v) else float(v) for v in row] for row in X]
    with predictor(bundled, tmp_path) as server:
        server.wait()
        answer = server.post("/v1/models/m:predict", {"instances": rows})
        assert answer.status == 200
        np.testing.assert_allclose(answer.json["predictions"], model.predict_proba(X)[:, 1], atol=1e-6)
        assert answer.headers["x-hafnium-contract"] == lender().digest


def test_the_bundle_says_what_was_measured_and_what_is_not_known(
    boosted: tuple[Case, HistGradientBoostingClassifier], bundled: Path,
) -> None:
    found, model = boosted
    bundle = open_bundle(bundled)
    assert bundle.manifest.opset == 20
    assert bundle.manifest.model_version == "t1"
    evaluation = json.loads((bundled / "evaluation.json").read_text())
    assert evaluation["metrics"]["roc_auc"]["value"] > 0.8
    assert evaluation["robustness"]["monotonicity"]["violations"] == 0
    assert evaluation["parity"]["against"] == "itself"
    assert evaluation["data"]["parts"]["test"]["rows"] == found.test.rows
    reference = pq.read_table(bundled / "reference.parquet").to_pandas()
    assert len(reference) == found.test.rows
    np.testing.assert_allclose(np.sort(reference["score"]), np.sort(model.predict_proba(found.test.X)[:, 1]), atol=1e-6)
    card = (bundled / "model_card.md").read_text()
    assert "Trained by the tests." in card
    assert "ONNX from tests 1" in card
    assert "was not checked" in card
    assert "trained on 2800" not in card


def test_the_same_model_and_rows_give_the_same_digest(
    boosted: tuple[Case, HistGradientBoostingClassifier], bundled: Path, tmp_path: Path,
) -> None:
    again, _ = make_bundle_of(replace(boosted[0].options, out=tmp_path / "again"))
    assert again.manifest.digest == open_bundle(bundled).manifest.digest


def test_the_command_makes_the_bundle_that_its_check_accepts(boosted: tuple[Case, HistGradientBoostingClassifier], tmp_path: Path) -> None:
    o, run = boosted[0].options, CliRunner()
    given = ["--model", o.model, "--contract", o.contract, "--data", o.data, "--out", tmp_path / "made", "--trained-by", "The risk team."]
    made = run.invoke(app, ["bundle", "create", *map(str, given), "--json"])
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["gates"]["monotone_violations"] == "pass"
    checked = run.invoke(app, ["bundle", "check", str(tmp_path / "made"), "--json"])
    assert json.loads(checked.stdout)["digest"] == said["digest"]


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, RandomForestClassifier]:
    found = case(tmp_path_factory.mktemp("forest"), NO_DIRECTIONS)
    model = RandomForestClassifier(80, max_depth=7, min_samples_leaf=20, random_state=0).fit(found.train.X.copy(), found.train.y)
    found.options.model.write_bytes(tree_model(model, 6))
    return found, model


def test_a_random_forest_fits_a_contract_without_directions(forest: tuple[Case, RandomForestClassifier]) -> None:
    found, model = forest
    bundle, _ = make_bundle_of(found.options)
    score, _ = scores(bundle.path, found.test.X)
    np.testing.assert_allclose(score, model.predict_proba(found.test.X.copy())[:, 1], atol=2e-6)


def test_a_model_that_breaks_the_contract_s_directions_gets_no_bundle(forest: tuple[Case, RandomForestClassifier], tmp_path: Path) -> None:
    directed = case(tmp_path / "directed", LENDER)
    with pytest.raises(GatesFailed, match=r"monotone_violations: \d+ of \d+ pairs break a direction of the contract, most for "):
        make_bundle_of(replace(directed.options, model=forest[0].options.model))
    assert not directed.options.out.exists()


def test_a_model_without_an_interval_is_refused_and_told_what_is_missing(
    boosted: tuple[Case, HistGradientBoostingClassifier], tmp_path: Path,
) -> None:
    path = tmp_path / "bare.onnx"
    path.write_bytes(tree_model(boosted[1], 6, interval=False))
    said = r"bare\.onnx: output 'interval' is missing; the graph has \['score'\]. Expected tensor\(float\) \['batch', 2\]: the range"
    with pytest.raises(BundleError, match=said):
        make_bundle_of(replace(boosted[0].options, model=path, out=tmp_path / "b"))


def test_files_that_are_no_model_of_this_contract_are_refused(
    boosted: tuple[Case, HistGradientBoostingClassifier], tmp_path: Path,
) -> None:
    options = replace(boosted[0].options, out=tmp_path / "b")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "narrow.onnx").write_bytes(tree_model(boosted[1], 5))
    for model, error, said in (
        (tmp_path / "absent.onnx", InputError, "absent.onnx: can't be read: No such file"),
        (tmp_path / "text.onnx", BundleError, "ONNX Runtime can't load it"),
        (tmp_path / "narrow.onnx", BundleError, r"the contract's 6 inputs need tensor\(float\) \[batch, 6\]"),
    ):
        with pytest.raises(error, match=said):
            make_bundle_of(replace(options, model=model))
    with pytest.raises(BundleError, match="holds another bundle"):
        make_bundle_of(replace(boosted[0].options, version="t2"))
    assert not (tmp_path / "b").exists()


def test_a_model_that_fails_on_missing_values_is_refused(
    boosted: tuple[Case, HistGradientBoostingClassifier], tmp_path: Path,
) -> None:
    nodes = [helper.make_node("ReduceMean", ["features", "one"], ["mean"], keepdims=1),
             helper.make_node("Sigmoid", ["mean"], ["column"]), helper.make_node("Squeeze", ["column", "one"], ["score"]),
             helper.make_node("Concat", ["column", "column"], ["interval"], axis=1)]
    graph = helper.make_graph(
        nodes, "mean", [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info("interval", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "mean.onnx")
    with pytest.raises(BundleError, match="not finite for a row of extremes"):
        make_bundle_of(replace(boosted[0].options, model=tmp_path / "mean.onnx", out=tmp_path / "b"))


def model_that_fails_for_a_debt(between: tuple[float, float], bad: float, wide: float = 0.0) -> bytes:
    """A plausible score, but `bad` (and an interval wider by `wide`) for a narrow range of the first input."""
    def number(name: str, values: Any, kind: int = TensorProto.FLOAT) -> onnx.TensorProto:
        array = np.atleast_1d(np.asarray(values))
        return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())
    nodes = [
        helper.make_node("Gather", ["features", "first"], ["debt"], axis=1), helper.make_node("IsNaN", ["debt"], ["blank"]),
        helper.make_node("Where", ["blank", "middle", "debt"], ["known"]), helper.make_node("Clip", ["known", "zero", "most"], ["clipped"]),
        helper.make_node("Mul", ["clipped", "slope"], ["logit"]), helper.make_node("Sigmoid", ["logit"], ["usual"]),
        helper.make_node("Greater", ["clipped", "low"], ["above"]), helper.make_node("Less", ["clipped", "high"], ["below"]),
        helper.make_node("And", ["above", "below"], ["hit"]), helper.make_node("Where", ["hit", "bad", "usual"], ["p"]),
        helper.make_node("Squeeze", ["p", "axis"], ["score"]), helper.make_node("Where", ["hit", "wide", "nothing"], ["more"]),
        helper.make_node("Add", ["p", "more"], ["upper"]), helper.make_node("Concat", ["p", "upper"], ["interval"], axis=1),
    ]
    given = [
        number("first", 0, TensorProto.INT64), number("axis", 1, TensorProto.INT64), number("middle", 30_000.0), number("slope", -4e-5),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]), helper.make_tensor("most", TensorProto.FLOAT, [], [1e6]),
        number("low", between[0]), number("high", between[1]), number("bad", bad), number("wide", wide), number("nothing", 0.0),
    ]
    graph = helper.make_graph(
        nodes, "narrow", [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
         helper.make_tensor_value_info("interval", TensorProto.FLOAT, ["batch", 2])], given,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


@pytest.mark.parametrize(("bad", "wide", "said"), [
    (float("nan"), 0.0, r"a score that is not finite for 1 of \d+ given rows \(first: {row}: nan\)"),
    (1.7, 0.0, r"a score outside \[0, 1\] for 1 of \d+ given rows \(first: {row}: 1\.7"),
    (-3.0, 0.0, r"a score outside \[0, 1\] for 1 of \d+ given rows \(first: {row}: -3\.0\)"),
    (0.5, 0.6, r"an interval outside \[0, 1\] for 1 of \d+ given rows \(first: {row}: \[0\.5, 1\.1"),
    (0.5, -0.1, r"an interval without the score for 1 of \d+ given rows \(first: {row}: \[0\.5, 0\.4"),
], ids=["nan", "above", "below", "wide-interval", "interval-without-score"])
def test_one_bad_score_among_all_given_rows_is_refused_and_its_row_named(tmp_path: Path, bad: float, wide: float, said: str) -> None:
    found = case(tmp_path / "narrow", NO_DIRECTIONS)
    debt = np.sort(found.test.X[:, 0][np.isfinite(found.test.X[:, 0])])
    at = len(debt) // 3
    found.options.model.write_bytes(model_that_fails_for_a_debt(
        ((debt[at - 1] + debt[at]) / 2, (debt[at] + debt[at + 1]) / 2), bad, wide,
    ))
    place = int(np.flatnonzero(found.test.X[:, 0] == debt[at])[0])
    column = found.test.contract.data.request_id
    row = f"row {int(found.test.request_ids[place]) + 1}" if column is None else f"{column} {found.test.request_ids[place]}"
    with pytest.raises(BundleError, match=said.format(row=row)):
        make_bundle_of(found.options)
    assert not found.options.out.exists()
