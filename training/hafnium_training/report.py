"""Measurements → the bundle's evaluation.json, model card and environment.json. Nothing here measures.

No file of a bundle holds a time that was measured or a moment at which something ran: two runs over the same data must give
the same digest, or nobody could check that a bundle came from the data it names.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from hafnium_contract.model_contract import ModelContract
from hafnium_training.calibration import METHOD, Fit
from hafnium_training.dataset import Dataset, Split
from hafnium_training.evaluation import Measured, interval_facts
from hafnium_training.export import PARITY_LIMIT
from hafnium_training.fairness import Group
from hafnium_training.gates import Findings, Gate
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_training.model_card import ModelCard, card_features, card_gates, card_metrics, make_card

PACKAGES = (
    "hafnium-serving", "torch", "numpy", "onnx", "onnxruntime", "ray", "optuna", "mlflow", "pandas", "pyarrow", "pydantic",
)
DIGITS = 7


@dataclass(frozen=True)
class Facts:
    """What the report says besides the findings."""

    contract: ModelContract
    model_version: str
    data_digest: str
    git_commit: str
    seed: int
    until: datetime | None
    epochs: int
    hyperparameters: Hyperparameters
    fit: Fit
    parameters: int
    """Trained numbers in the network."""


def to_json(value: object) -> bytes:
    """Pretty JSON with sorted keys; dataclasses become camelCase objects, numbers that are not finite null."""
    return (json.dumps(_plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {to_camel(f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        # seven digits: more would claim a precision that no metric of some thousand rows has
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def evaluation(facts: Facts, split: Split, found: Findings, groups: dict[str, tuple[Group, ...]], gates: tuple[Gate, ...]) -> bytes:
    """evaluation.json."""
    return _evaluation(
        facts.contract, facts.model_version, facts.data_digest, split.parts(), interval_facts(facts.fit, facts.contract), found, groups,
        gates,
    )


def _evaluation(
    contract: ModelContract, version: str, data_digest: str, parts: Sequence[tuple[str, Dataset]], calibration: dict[str, object],
    found: Findings, groups: dict[str, tuple[Group, ...]], gates: tuple[Gate, ...],
) -> bytes:
    comparison = found.comparison
    return to_json({
        "schemaVersion": 1,
        "model": {"name": contract.name, "version": version},
        "data": {"digest": data_digest, "parts": {name: _part(part) for name, part in parts}},
        "metrics": found.quality.metrics,
        "slices": found.quality.slices,
        "fairness": {
            "threshold": contract.decision.threshold, "groups": groups, "measures": found.fairness,
        },
        "calibration": {
            **calibration, "curve": found.quality.curve,
            "intervalBins": found.quality.interval_bins, "intervalCovered": found.quality.interval_covered,
        },
        "robustness": found.robustness,
        "parity": {**_plain(found.parity), "limit": PARITY_LIMIT},
        "production": None if comparison is None else comparison,
        "gates": [
            {"name": g.name, "verdict": g.verdict, "limit": g.limit}
            | ({"value": g.value, "message": g.message} if g.reproducible else {}) for g in gates
        ],
    })


def _part(data: Dataset) -> dict[str, object]:
    return {
        "rows": data.rows, "positives": data.positives,
        "first": _moment(int(data.event_time[0])), "last": _moment(int(data.event_time[-1])),
    }


def _moment(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def card(facts: Facts, split: Split, found: Findings, gates: tuple[Gate, ...]) -> ModelCard:
    """The model card, from the findings."""
    return _card(
        facts.contract, found, gates, version=facts.model_version, data_digest=facts.data_digest, git_commit=facts.git_commit,
        seed=facts.seed, kind=f"Smooth min-max monotone network, {facts.parameters} parameters, ONNX",
        training_data=_sentence(split.train), evaluation_data=f"{_sentence(split.test)} Newer than every row of the training data.",
        calibration=(
            f"Temperature {facts.fit.temperature:.3g}, offset {facts.fit.offset:.3g}, fitted on {split.validation.rows} "
            "validation rows."
        ),
        interval=METHOD,
        limitations=(
            "The interval describes how well similar scores were supported by validation rows. It does not cover drift.", *split.notices,
        ),
    )


def _card(
    c: ModelContract, found: Findings, gates: tuple[Gate, ...], *, version: str, data_digest: str, git_commit: str, seed: int, kind: str,
    training_data: str, evaluation_data: str, calibration: str, interval: str, limitations: tuple[str, ...],
) -> ModelCard:
    metrics, mono = found.quality.metrics, found.robustness.monotonicity
    personal = [f.name for f in c.features if f.personal]
    attributes = list(dict.fromkeys(s.attribute for s in found.quality.slices))
    directed = [f.name for f in c.inputs if f.monotone != "none"]
    return make_card(
        details={
            "name": c.name, "version": version, "owner": c.owner, "kind": kind, "contract_version": c.version,
            "contract_digest": c.digest, "data_digest": data_digest, "git_commit": git_commit, "seed": seed,
        },
        description=c.description,
        intended_use=(
            f"{c.description} A score of at least {c.decision.threshold:g} leads to `{c.decision.above}`, a lower one to "
            f"`{c.decision.below}`. Requests must keep to the contract; features are looked up and derived by the transformer."
        ),
        out_of_scope=(
            "decisions about a person without a human who can change them",
            "data that the contract does not describe, or another population than the training data's",
            "a reading of the score's explanation as a cause",
        ),
        training_data=training_data, evaluation_data=evaluation_data,
        features=card_features(c), metrics=card_metrics(metrics),
        slices=_slices_text(found, attributes),
        fairness=_fairness_text(found, gates),
        calibration=(
            f"{calibration} Expected calibration error {_number(metrics['ece'])} (bins of equal mass), Brier score "
            f"{_number(metrics['brier'])}. Interval: {interval}; "
            f"{found.quality.interval_covered:.0%} of {found.quality.interval_bins} bins of the evaluation data lie inside."
        ),
        robustness=(
            f"{mono.violations} violations in {mono.pairs} random pairs, for {', '.join(directed) or 'no directed feature'}. Noise "
            f"of 1 % of each input's deviation changes the score by {found.robustness.noise_mean:.2g} on average and "
            f"{found.robustness.decisions_changed:.2%} of decisions."
        ),
        gates=card_gates(gates),
        limitations=_limitations(found, gates, limitations),
        personal_data=(
            f"Inputs that are personal data: {', '.join(personal)}. They are neither logged nor in the reference sample."
            if personal else "No feature is declared as personal data."
        ),
    )


@dataclass(frozen=True)
class Foreign:
    """What is known of a model that something else has trained."""

    contract: ModelContract
    model_version: str
    data_digest: str
    git_commit: str
    seed: int
    origin: str
    """Who or what trained it, in the words of whoever made the bundle."""
    producer: str
    """What the ONNX file says of the program that wrote it."""


def foreign_evaluation(
    facts: Foreign, data: Dataset, found: Findings, groups: dict[str, tuple[Group, ...]], gates: tuple[Gate, ...],
) -> bytes:
    """evaluation.json of a model that something else has trained."""
    calibration: dict[str, object] = {"intervalMethod": "the model's own", "decisionThreshold": facts.contract.decision.threshold}
    return _evaluation(
        facts.contract, facts.model_version, facts.data_digest, (("test", data),), calibration, found, groups, gates,
    )


def foreign_card(facts: Foreign, data: Dataset, found: Findings, gates: tuple[Gate, ...]) -> ModelCard:
    """The model card of a model that something else has trained: what was measured here, and what is not known here."""
    return _card(
        facts.contract, found, gates, version=facts.model_version, data_digest=facts.data_digest, git_commit=facts.git_commit,
        seed=facts.seed, kind=f"ONNX from {facts.producer}; {facts.origin}",
        training_data=f"Not known here. {facts.origin}",
        evaluation_data=f"{_sentence(data)} Whoever made the bundle says that the model was not trained on them.",
        calibration="The model's own; none was fitted here.", interval="the model's own",
        limitations=("What the model was trained on, and how, was not checked.", *data.notices),
    )


def foreign_environment(facts: Foreign) -> bytes:
    """environment.json: with what the model was measured; with what it was trained is not known here."""
    return to_json({
        "schemaVersion": 1, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: v for name in PACKAGES if (v := package_version(name)) is not None}, "seed": facts.seed,
        "dataDigest": facts.data_digest, "contractDigest": facts.contract.digest, "origin": facts.origin, "producer": facts.producer,
    })


def _sentence(part: Dataset) -> str:
    return (
        f"{part.rows} rows from {_moment(int(part.event_time[0]))} to {_moment(int(part.event_time[-1]))}, "
        f"{part.positives} positive ({part.positives / part.rows:.2%})."
    )


def _number(m: Measured) -> str:
    return f"{m.value:.4f} [{m.lower:.4f}, {m.upper:.4f}]"


def _slices_text(found: Findings, attributes: list[str]) -> str:
    measured = [s for s in found.quality.slices if s.roc_auc is not None]
    if not attributes:
        return "The contract has no protected attribute and no category to slice by."
    if not measured:
        return f"Sliced by {', '.join(attributes)}: no slice has enough positives for a ROC-AUC."
    worst = min(measured, key=lambda s: s.roc_auc.value if s.roc_auc else 1.0)
    auc = worst.roc_auc
    return (
        f"Sliced by {', '.join(attributes)}; {len(measured)} of {len(found.quality.slices)} slices have enough positives. Lowest ROC-AUC: "
        f"{worst.attribute} = {worst.value}, {_number(auc) if auc else ''} over {worst.rows} rows."
    )


def _fairness_text(found: Findings, gates: tuple[Gate, ...]) -> str:
    own = [g for g in gates if g.name.startswith("fairness.")]
    if not own:
        return "The data hold no protected attribute, so fairness was not measured."
    return " ".join(f"{g.name.removeprefix('fairness.')}: {g.verdict} ({g.message})." for g in own)


def _limitations(found: Findings, gates: tuple[Gate, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    out = [
        "Measured on history. When customers or fraudsters change, the numbers above stop being true; the drift monitor says when.",
        *own,
        "Labels count only those frauds that were reported; a fraud that nobody reported is a negative here.",
    ]
    open_gates = [g.name for g in gates if g.verdict == "not enough data"]
    if found.robustness.causes:
        worst = max(found.robustness.causes.values())
        out.append(
            "A feature that others are derived from reaches the score along several inputs, where the direction is only trained for, not "
            f"guaranteed: {', '.join(found.robustness.causes)} ({worst:.2%} of rows fall against it)."
        )
    if open_gates:
        out.append(f"Groups or slices with too few data to judge: {', '.join(open_gates)}.")
    return tuple(out)


def environment(facts: Facts) -> bytes:
    """environment.json: what is needed to make the same bundle again. No host name, no path, no time."""
    facts_json = _plain({
        "schemaVersion": 1,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "packages": {name: v for name in PACKAGES if (v := package_version(name)) is not None},
        "seed": facts.seed,
        "threads": 1,
        "dataDigest": facts.data_digest,
        "contractDigest": facts.contract.digest,
        "until": None if facts.until is None else facts.until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "epochsMax": facts.epochs,
    })
    # not rounded like measurements: retraining with them has to give the same model
    facts_json["hyperparameters"] = facts.hyperparameters.model_dump(mode="json")
    return (json.dumps(facts_json, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Model name of the processor; another one may round sums otherwise."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
