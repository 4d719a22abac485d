"""data → split → search → train → calibrate → export → evaluate → gates → bundle → register: `train(options, progress)`.

The order is chosen so that a failure costs little and leaves nothing half done: the bundle is written only after every gate has
passed, and it is registered only after it was written. A run whose gates failed is recorded too, without a model.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hafnium_contract.bundle import Bundle, check_destination, open_bundle, write_bundle
from hafnium_contract.contract_file import read_contract
from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.inference_log import FEATURE_PREFIX, logged_features
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.progress import Progress
from hafnium_training import report
from hafnium_training.calibration import calibrate
from hafnium_training.dataset import Dataset, Split, dataset_of, split_by_time
from hafnium_training.evaluation import Comparison, compare, evaluate
from hafnium_training.export import Scorer, difficult_rows, export_onnx, measure_parity
from hafnium_training.fairness import Group, fairness_of, groups_of
from hafnium_training.fit import Fitted, Prepare, fit, prepare, score_rows
from hafnium_training.gates import Findings, Gate, GatesFailed, judge, require
from hafnium_training.graph import RiskModel
from hafnium_training.helper_process import HelperProcess
from hafnium_training.hyperparameters import Hyperparameters, parse_hyperparameters
from hafnium_training.latency import Latency, measure_latency
from hafnium_training.model_card import markdown
from hafnium_training.onnx_graph import OPSET
from hafnium_training.robustness import measure_robustness
from hafnium_training.search import Searched, Trial, search, search_key, searching, trial_storage
from hafnium_training.tables import read_table
from hafnium_training.tracking import DIGEST_TAG, RunRecord, TrialRecord, is_server

EPOCHS = 40
"""Of at most 400 batches; early stopping ends most trainings before."""
SEARCH_EPOCHS = 15
REFERENCE_ROWS_MAX = 10_000
RECENT_SHARE = 0.3
LATENCY_ROWS = 256
SEED_MAX = 2**32 - 1
"""Optuna's and NumPy's older generators take no more."""
STAGES = ("load", "search", "train", "export", "evaluate", "compare", "write", "track")


class NotRecordedError(HafniumError):
    """The bundle was written, and MLflow could not be told of it."""

    exit_status = 3

    def __init__(self, bundle: Bundle, cause: HafniumError) -> None:
        self.bundle = bundle
        super().__init__(
            f"bundle written at {bundle.path} ({bundle.manifest.digest}), not recorded in MLflow ({cause}); run again to record it"
        )


@dataclass(frozen=True)
class TrainOptions:
    """What to train, from what, and where it goes."""

    contract: Path
    data: Path
    """Flat table (CSV or Parquet), see `hafnium features join`."""
    out: Path
    """The bundle's folder; must not hold another bundle."""
    version: str | None = None
    """Model version; without it a short hash of all that decides the bundle: data, contract, commit, and every option."""
    trials: int = 1
    """1: no search (and no Ray), the model is trained with `params` or the defaults."""
    seed: int = 0
    until: datetime | None = None
    """Train as if it were then: only labels known by this moment."""
    params: Hyperparameters | dict[str, Any] | None = None
    """Hyperparameters to use; then there is no search whatever `trials` says."""
    tracking: Path | str | None = None
    """Folder of the MLflow database, or http(s):// of an MLflow server; None: no tracking."""
    production: Path | None = None
    """Bundle to be no worse and no slower than."""
    epochs: int = EPOCHS
    search_epochs: int = SEARCH_EPOCHS
    work: Path | str | None = None
    """Where an unfinished search is kept, a folder or s3://BUCKET/PREFIX; by default beside `out`."""
    at_once: int = 1
    """Trials side by side, see search.py."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training. `seconds` per stage, `latency` and `run_id` are of this run and in no file of the bundle."""

    bundle: Bundle
    metrics: dict[str, float]
    hyperparameters: Hyperparameters
    trials: tuple[Trial, ...]
    gates: tuple[Gate, ...]
    latency: Latency | None
    seconds: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    registered_version: str | None = None


@dataclass(frozen=True)
class _Trained:
    """A model and everything measured about it, before any gate has been looked at."""

    facts: report.Facts
    model: bytes
    scorer: Scorer
    findings: Findings
    groups: dict[str, tuple[Group, ...]]


class _Watch:
    """Seconds per stage, and the listener's stages."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Generator[None]:
        self.progress.stage(name, total)
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


def train(options: TrainOptions, progress: Progress) -> TrainResult:
    """Trains, measures, judges and writes a bundle.

    Raises InputError for unusable data or options, GatesFailed (a HafniumError) when the model may not go out; then no bundle
    was written. Raises NotRecordedError when one was written but MLflow failed; the same call again records it.
    The same data, contract, options and machine give the same bundle digest.
    """
    contract, contract_bytes = read_contract(options.contract)
    given = parse_hyperparameters(options.params, "--params") if isinstance(options.params, dict) else options.params
    if options.epochs < 1:
        raise InputError(f"--epochs {options.epochs}: expected at least 1")
    check_seed(options.seed)
    check_destination(options.out, options.version)
    if options.tracking is not None:
        is_server(options.tracking)
    if options.work is not None:
        trial_storage(options.work)
    there = open_bundle(options.out) if options.out.exists() else None
    needs_search = given is None and options.trials > 1
    watch = _Watch(progress)
    with ExitStack() as stack:
        # the slow starters first, on the second core
        ray = stack.enter_context(searching(options.at_once)) if needs_search else None
        production = None if options.production is None else open_bundle(options.production)
        tracker = None
        if options.tracking is not None:
            tracker = stack.enter_context(HelperProcess("hafnium_training.tracking", options.tracking))

        with watch.stage("load"):
            frame = read_table(options.data, contract, also=None if production is None else production.contract)
            data = dataset_of(frame, contract, until=options.until, source=str(options.data))
            split = split_by_time(data)
            digest = data.digest()
            version = options.version or _short_version(digest, contract, options, given, production)
            if there is not None:
                _same_training(there, options, contract, digest, version)
            prepared = prepare(split, options.seed)
            rivals = None if production is None else _rival_rows(frame, production, options, split)
            progress.event(f"{data.rows} rows, {data.positives} positive: " + ", ".join(f"{n} {p.rows}" for n, p in split.parts()))
            for notice in split.notices:
                progress.event(f"note: {notice}")

        searched, key = Searched(given or Hyperparameters(), ()), ""
        folder = options.work or options.out.parent / f".{options.out.name}.search"
        if ray is not None:
            with watch.stage("search", options.trials):
                key = search_key(digest, contract.digest, options.trials, options.search_epochs, options.seed, options.at_once)
                searched = search(
                    ray, prepared, trials=options.trials, epochs=options.search_epochs, seed=options.seed, place=folder, key=key,
                    progress=progress, at_once=options.at_once,
                )

        with watch.stage("train", options.epochs):
            fitted = fit(
                prepared, searched.best, epochs=options.epochs, seed=options.seed, on_epoch=lambda _: progress.advance(),
            )
            progress.event(f"best epoch {fitted.best.number}: validation PR-AUC {fitted.best.validation_pr_auc:.4f}")
        trained = _measure(options, contract, version, data, split, prepared, fitted, searched.best, digest, watch)
        comparison = latency = None
        if production is not None and rivals is not None:
            with watch.stage("compare"):
                comparison, latency = _against_production(trained.scorer, split, production, rivals, options.seed)
        findings = Findings(
            trained.findings.quality, trained.findings.fairness, trained.findings.robustness, trained.findings.parity,
            comparison, latency,
        )
        gates = judge(findings)
        bundle = None
        error: GatesFailed | None = None
        with watch.stage("write"):
            try:
                require(gates)
                bundle = _write(options, contract_bytes, trained, findings, gates, data, split)
            except GatesFailed as e:
                error = e
        run_id = registered = untracked = None
        if tracker is not None:
            with watch.stage("track"):
                try:
                    tracked = tracker.call(
                        "record", options.tracking, _run_record(trained, findings, gates, searched, bundle, watch.seconds),
                    )
                    run_id, registered = tracked.run_id, tracked.model_version
                except HafniumError as e:
                    untracked = e
        if error is not None:
            if untracked is not None:
                error.add_note(f"This run is not in MLflow either: {untracked}")
            raise error
        if bundle is None:
            raise AssertionError("gates passed, so a bundle was written")
        if untracked is not None:
            raise NotRecordedError(bundle, untracked) from untracked
        # the last: until here a killed training goes on with it
        if options.work is None:
            shutil.rmtree(folder, ignore_errors=True)
        elif key:
            trial_storage(folder).forget(key)
        return TrainResult(
            bundle, {k: m.value for k, m in findings.quality.metrics.items()}, searched.best, searched.trials, gates, latency,
            watch.seconds, run_id, registered,
        )


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that one of the generators would refuse, or take for another one."""
    if not 0 <= seed <= SEED_MAX:
        raise InputError(f"--seed {seed}: expected 0 to {SEED_MAX}")


def _same_training(there: Bundle, options: TrainOptions, contract: ModelContract, digest: str, version: str) -> None:
    """Raises InputError when `out` holds what this training can't have made: before the search, and not an hour later.

    A bundle of the same training is fine, so that one that was killed at its very end may run again. What a manifest doesn't say (trials,
    epochs, hyperparameters) is in a version that nobody chose; with a chosen one it is noticed when the bundle is written.
    """
    found = there.manifest
    ours = {
        "model": contract.name, "version": version, "contract": contract.digest,
        "data": digest, "seed": options.seed, "commit": git_commit(Path.cwd()),
    }
    theirs = {
        "model": found.model_name, "version": found.model_version, "contract": found.contract_digest, "data": found.data_digest,
        "seed": found.seed, "commit": found.git_commit,
    }
    others = [name for name, value in ours.items() if theirs[name] != value]
    if others:
        raise InputError(
            f"--out {options.out}: holds another bundle already ({found.model_name} {found.model_version}, {found.digest}; other "
            f"{', '.join(others)}); a bundle never changes: choose another --out"
        )


def _measure(
    options: TrainOptions, contract: ModelContract, version: str, data: Dataset, split: Split, prepared: Prepare, fitted: Fitted,
    hyper: Hyperparameters, digest: str, watch: _Watch,
) -> _Trained:
    """Calibrates, exports, and measures the exported model."""
    seed = options.seed
    with watch.stage("export"):
        logit = score_rows(split.validation, prepared.preprocessing, fitted.network)
        calibration = calibrate(logit, split.validation.y, fitted.prior_correction)
        model = RiskModel(prepared.preprocessing, fitted.network, calibration)
        onnx_bytes = export_onnx(model, len(contract.inputs))
        scorer = Scorer(onnx_bytes)
        parity = measure_parity(model, scorer, difficult_rows(contract, split.test.X, seed))
    with watch.stage("evaluate"):
        score, interval = scorer.both(split.test.X)
        threshold = contract.decision.threshold
        quality = evaluate(split.test, score, interval, threshold, seed)
        groups = {a: groups_of(split.test, a, score, threshold) for a in split.test.protected}
        fairness = tuple(f for a, g in groups.items() for f in fairness_of(a, g, seed))
        robustness = measure_robustness(split.test, scorer, threshold, seed)
    facts = report.Facts(
        contract=contract, model_version=version, data_digest=digest,
        git_commit=git_commit(Path.cwd()), seed=seed, until=options.until, epochs=options.epochs, hyperparameters=hyper,
        fit=calibration, parameters=sum(p.numel() for p in fitted.network.parameters()),
    )
    return _Trained(facts, onnx_bytes, scorer, Findings(quality, fairness, robustness, parity, None, None), groups)


def _rival_rows(frame: pd.DataFrame, production: Bundle, options: TrainOptions, split: Split) -> Matrix:
    """The test rows as the production model's contract encodes them (float32 [test rows, its inputs])."""
    if production.contract.digest == split.test.contract.digest:
        return split.test.X
    try:
        theirs = dataset_of(frame, production.contract, until=options.until, source=str(options.data), compared_only=True)
    except InputError as e:
        raise InputError(
            f"--production {production.path}: its contract (version {production.contract.version}) can't be read from {options.data}: {e}"
        ) from e
    place = {str(name): i for i, name in enumerate(theirs.request_ids)}
    rows = [place.get(str(name), -1) for name in split.test.request_ids]
    if -1 in rows:
        raise InputError(
            f"--production {production.path}: its contract (version {production.contract.version}) has other ids or label times, so the "
            "two models can't be compared on the same rows"
        )
    return theirs.X[np.array(rows)]


def _against_production(
    scorer: Scorer, split: Split, production: Bundle, theirs: Matrix, seed: int,
) -> tuple[Comparison, Latency]:
    rival = Scorer(production.model_path.read_bytes())
    X = split.test.X
    comparison = compare(
        production.manifest.digest, production.manifest.model_version, split.test.y, scorer(X), rival(theirs), seed,
    )
    return comparison, measure_latency((scorer, X[:LATENCY_ROWS]), (rival, theirs[:LATENCY_ROWS]))


def _write(
    options: TrainOptions, contract_bytes: bytes, trained: _Trained, findings: Findings, gates: tuple[Gate, ...], data: Dataset,
    split: Split,
) -> Bundle:
    facts = trained.facts
    card = report.card(facts, split, findings, gates)
    files = {
        "model.onnx": trained.model,
        "contract.yaml": contract_bytes,
        "evaluation.json": report.evaluation(facts, split, findings, trained.groups, gates),
        "model_card.json": report.to_json(card.model_dump(mode="json")),
        "model_card.md": markdown(card).encode(),
        "reference.parquet": reference(data, trained.scorer, options.seed),
        "environment.json": report.environment(facts),
    }
    return write_bundle(
        options.out, files, contract=facts.contract, model_version=facts.model_version, data_digest=facts.data_digest,
        git_commit=facts.git_commit, seed=facts.seed, opset=OPSET,
    )


def reference(data: Dataset, scorer: Scorer, seed: int) -> bytes:
    """Parquet: `feature_<name>` for each input that is not personal (encoded, NaN = missing), `score`, `label`.

    At most 10,000 rows, drawn from the newest 30 % (or the newest 10,000): the rows that live traffic is most like.
    """
    recent = min(data.rows, max(round(data.rows * RECENT_SHARE), REFERENCE_ROWS_MAX))
    rows = np.arange(data.rows - recent, data.rows, dtype=np.int64)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:REFERENCE_ROWS_MAX])
    sample = data.take(rows)
    at = {name: j for j, name in enumerate(data.contract.input_names)}
    columns: dict[str, pa.Array] = {
        FEATURE_PREFIX + f.name: pa.array(sample.X[:, at[f.name]], pa.float32()) for f in logged_features(data.contract)
    }
    columns["score"] = pa.array(scorer(sample.X), pa.float32())
    columns["label"] = pa.array(sample.y, pa.int8())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _run_record(
    trained: _Trained, findings: Findings, gates: tuple[Gate, ...], searched: Searched, bundle: Bundle | None,
    seconds: dict[str, float],
) -> RunRecord:
    facts = trained.facts
    metrics = {name: m.value for name, m in findings.quality.metrics.items()}
    metrics |= {f"seconds_{name}": s for name, s in seconds.items()}
    if findings.latency is not None:
        metrics |= {
            "latency_ms": findings.latency.candidate_ms, "production_latency_ms": findings.latency.production_ms,
            "latency_ratio": findings.latency.ratio,
        }
    tags = {
        "hafnium.git_commit": facts.git_commit, "hafnium.data_digest": facts.data_digest,
        "hafnium.contract_digest": facts.contract.digest, "hafnium.model_version": facts.model_version,
        "hafnium.gates_failed": ", ".join(g.name for g in gates if g.stops),
    }
    if bundle is not None:
        tags[DIGEST_TAG] = bundle.manifest.digest
    return RunRecord(
        experiment=facts.contract.name, name=f"{facts.contract.name}-{facts.model_version}",
        parameters={**facts.hyperparameters.model_dump(), "seed": facts.seed, "trials": len(searched.trials) or 1},
        metrics=metrics, tags=tags,
        trials=tuple(
            TrialRecord(
                f"trial-{t.number}", t.hyperparameters.model_dump(), {"validation_pr_auc": t.validation_pr_auc, "epochs": t.epochs}, t.node,
            )
            for t in searched.trials
        ),
        files={} if bundle is None else {
            name: (bundle.path / name).read_text(encoding="utf-8") for name in ("evaluation.json", "model_card.md", "environment.json")
        },
        onnx=None if bundle is None else trained.model, inputs=len(facts.contract.inputs),
        requirements=tuple(f"{name}=={v}" for name in ("onnx", "onnxruntime", "numpy") if (v := report.package_version(name))),
    )


def git_commit(folder: Path) -> str:
    """Commit of the working folder, or `unknown` when it is in no repository or there is no git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown" if done.returncode == 0 else "unknown"


def _short_version(
    digest: str, contract: ModelContract, options: TrainOptions, given: Hyperparameters | None, production: Bundle | None,
) -> str:
    """Of all that decides the bundle: two arms of a rollout are told apart by it, in metrics and logs."""
    if given is None and options.trials > 1:
        hyper = f"search {options.trials} {options.search_epochs} {options.at_once}"
    else:
        hyper = (given or Hyperparameters()).model_dump_json()
    facts = (
        digest, contract.digest, options.seed, options.epochs, hyper, git_commit(Path.cwd()),
        "" if production is None else production.manifest.digest,
    )
    return hashlib.sha256("\n".join(str(f) for f in facts).encode()).hexdigest()[:10]
