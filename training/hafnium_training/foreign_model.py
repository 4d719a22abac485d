"""A model that something else has trained → a bundle, measured and judged like one of our own.

What it was trained on can't be checked here. What it does can: the graph is held against the contract, scored on rows that it was not
trained on, asked for rows of extremes, and its directions are tried on random pairs. The same gates decide. Without labelled rows
there is no bundle: nobody could say how good the model is, and drift would have nothing to be measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from hafnium_contract.bundle import BYTES_MAX, MODEL, Bundle, bytes_digest, check_destination, write_bundle
from hafnium_contract.contract_file import read_contract
from hafnium_contract.errors import BundleError, HafniumError, InputError
from hafnium_contract.graph import check_graph
from hafnium_training import report
from hafnium_training.dataset import Dataset, load_dataset
from hafnium_training.evaluation import evaluate
from hafnium_training.export import Scorer, Scores, difficult_rows, measure_parity
from hafnium_training.fairness import fairness_of, groups_of
from hafnium_training.gates import Findings, Gate, judge, require
from hafnium_training.model_card import markdown
from hafnium_training.pipeline import check_seed, git_commit, reference
from hafnium_training.robustness import measure_robustness


@dataclass(frozen=True)
class ForeignOptions:
    """What to make a bundle of."""

    model: Path
    contract: Path
    data: Path
    """Flat table (CSV or Parquet) of labelled rows that the model was not trained on."""
    out: Path
    origin: str
    """Who or what trained it; stands in the model card."""
    version: str | None = None
    """Without it a short hash of the model's bytes."""
    seed: int = 0


def make_bundle_of(options: ForeignOptions) -> tuple[Bundle, tuple[Gate, ...]]:
    """Measures, judges and writes.

    Raises InputError or BundleError for a file that can't be used, GatesFailed (a HafniumError) when the model may not go out; then no
    bundle was written.
    """
    contract, contract_bytes = read_contract(options.contract)
    check_seed(options.seed)
    check_destination(options.out, options.version)
    model = _bytes(options.model)
    scorer = _scorer(options.model, model)
    check_graph(options.model, contract, scorer.session)
    data = load_dataset(options.data, contract)
    found, groups = _measured(options.model, data, scorer, options.seed)
    gates = judge(found)
    require(gates)
    proto = onnx.load_from_string(model)
    facts = report.Foreign(
        contract=contract, model_version=options.version or bytes_digest(model).removeprefix("sha256:")[:8], data_digest=data.digest(),
        git_commit=git_commit(Path.cwd()), seed=options.seed, origin=options.origin,
        producer=f"{proto.producer_name} {proto.producer_version}".strip() or "an unnamed program",
    )
    card = report.foreign_card(facts, data, found, gates)
    files = {
        MODEL: model,
        "contract.yaml": contract_bytes,
        "evaluation.json": report.foreign_evaluation(facts, data, found, groups, gates),
        "model_card.json": report.to_json(card.model_dump(mode="json")),
        "model_card.md": markdown(card).encode(),
        "reference.parquet": reference(data, scorer, options.seed),
        "environment.json": report.foreign_environment(facts),
    }
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    bundle = write_bundle(
        options.out, files, contract=contract, model_version=facts.model_version, data_digest=facts.data_digest,
        git_commit=facts.git_commit, seed=options.seed, opset=opset,
    )
    return bundle, gates


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > BYTES_MAX:
            raise InputError(f"{path}: larger than {BYTES_MAX} bytes")
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: can't be read: {e.strerror}; expected an ONNX file") from e


def _scorer(path: Path, model: bytes) -> Scorer:
    try:
        return Scorer(model)
    except Exception as e:  # ONNX Runtime's errors share no base but Exception
        raise BundleError(f"{path}: ONNX Runtime can't load it: {str(e)[:300]}; expected one ONNX file with all of its weights") from e


def _measured(path: Path, data: Dataset, scorer: Scorer, seed: int) -> tuple[Findings, dict[str, tuple[report.Group, ...]]]:
    threshold = data.contract.decision.threshold
    try:
        parity = measure_parity(None, scorer, difficult_rows(data.contract, data.X, seed))
        score, interval = scorer.both(data.X)
        _require_sound(data, score, interval)
    except HafniumError as e:
        raise BundleError(f"{path}: {e}") from e
    except Exception as e:  # a graph may fail on any row
        raise BundleError(f"{path}: fails on a row of extremes or of {data.rows} given ones: {str(e)[:300]}") from e
    groups = {a: groups_of(data, a, score, threshold) for a in data.protected}
    fairness = tuple(f for a, g in groups.items() for f in fairness_of(a, g, seed))
    return Findings(
        evaluate(data, score, interval, threshold, seed), fairness, measure_robustness(data, scorer, threshold, seed), parity, None, None,
    ), groups


def _require_sound(data: Dataset, score: Scores, interval: Scores) -> None:
    """Raises HafniumError when any row's score is not a probability or its interval doesn't hold it.

    Of every row, since a graph can go wrong for a narrow range of one input only, and metrics over ranks don't show it.
    """
    checks = (
        ("a score that is not finite", ~np.isfinite(score), score),
        ("a score outside [0, 1]", (score < 0.0) | (score > 1.0), score),
        ("an interval that is not finite", ~np.isfinite(interval).all(axis=1), interval),
        ("an interval outside [0, 1]", ((interval < 0.0) | (interval > 1.0)).any(axis=1), interval),
        ("an interval without the score", (score < interval[:, 0]) | (score > interval[:, 1]), interval),
    )
    for what, wrong, values in checks:
        rows = np.flatnonzero(wrong)
        if len(rows):
            first = int(rows[0])
            raise HafniumError(
                f"gives {what} for {len(rows)} of {data.rows} given rows (first: {_row_name(data, first)}: {values[first].tolist()})"
            )


def _row_name(data: Dataset, row: int) -> str:
    """Datasets are sorted by time, so a place in them says nothing: the id, or the number in the file (from 1, without the header)."""
    column = data.contract.data.request_id
    given = str(data.request_ids[row])
    return f"row {int(given) + 1}" if column is None else f"{column} {given}"
