"""The model card: what a person has to know before they approve the model, made from what was measured.

After Mitchell et al., "Model Cards for Model Reporting", FAT* 2019. Every section is required and may not be empty: a card that
leaves out its limits is worse than none, because it looks complete.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import Feature, FromDerived, FromView, ModelContract, Strict
from hafnium_training.evaluation import Measured
from hafnium_training.gates import Gate

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class CardMetric(Strict):
    name: Text
    value: float
    lower: float | None = None
    upper: float | None = None


class CardGate(Strict):
    name: Text
    verdict: Text
    limit: Text
    message: Text


class CardFeature(Strict):
    name: Text
    description: Text
    source: Text
    monotone: Text
    personal: bool


class ModelDetails(Strict):
    name: Text
    version: Text
    owner: Text
    kind: Text
    contract_version: Text
    contract_digest: Text
    data_digest: Text
    git_commit: Text
    seed: int


class ModelCard(Strict):
    """All sections of the card. A list or a text that is empty does not validate."""

    schema_version: Literal[1] = 1
    details: ModelDetails
    description: Text
    intended_use: Text
    out_of_scope: Annotated[tuple[Text, ...], Field(min_length=1)]
    training_data: Text
    evaluation_data: Text
    features: Annotated[tuple[CardFeature, ...], Field(min_length=1)]
    metrics: Annotated[tuple[CardMetric, ...], Field(min_length=1)]
    slices: Text
    fairness: Text
    calibration: Text
    robustness: Text
    gates: Annotated[tuple[CardGate, ...], Field(min_length=1)]
    limitations: Annotated[tuple[Text, ...], Field(min_length=1)]
    personal_data: Text


def make_card(**sections: object) -> ModelCard:
    """Checks the sections. Raises HafniumError that names each one that is missing or empty."""
    try:
        return ModelCard.model_validate(sections)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(str(s) for s in x['loc'])}: {x['msg'].lower()}" for x in e.errors())
        raise HafniumError(f"the model card is not complete: {wrong}") from e


def card_features(contract: ModelContract) -> tuple[CardFeature, ...]:
    return tuple(
        CardFeature(
            name=f.name, description=f.description, source=_source(f), monotone=f.monotone, personal=f.personal,
        ) for f in contract.inputs
    )


def _source(f: Feature) -> str:
    if isinstance(f.source, FromView):
        return f"view {f.source.view}"
    if isinstance(f.source, FromDerived):
        return f"{f.source.derived.operation}({', '.join(f.source.derived.inputs)})"
    return "request"


def card_metrics(metrics: dict[str, Measured]) -> tuple[CardMetric, ...]:
    """Those that could be measured, rounded to what a reader can use."""
    return tuple(
        CardMetric(name=name, value=round(m.value, 4), lower=_rounded(m.lower), upper=_rounded(m.upper))
        for name, m in metrics.items() if math.isfinite(m.value)
    )


def _rounded(x: float) -> float | None:
    return round(x, 4) if math.isfinite(x) else None


def card_gates(gates: tuple[Gate, ...]) -> tuple[CardGate, ...]:
    """Gates on measured times keep their verdict and limit, and leave the times out (they differ from run to run)."""
    return tuple(
        CardGate(name=g.name, verdict=g.verdict, limit=g.limit, message=g.message if g.reproducible else g.verdict) for g in gates
    )


def markdown(card: ModelCard) -> str:
    """The card as Markdown with a YAML header in the form that model hubs read."""
    d = card.details
    lines = [
        "---", "library_name: onnx", "pipeline_tag: tabular-classification", "tags: [risk, monotone, hafnium]", "---",
        f"# {d.name} {d.version}", "", card.description, "",
        f"Owner: {d.owner}. {d.kind}. Contract {d.contract_version} (`{d.contract_digest}`), data `{d.data_digest}`, "
        f"commit `{d.git_commit}`, seed {d.seed}.", "",
        "## Intended use", "", card.intended_use, "", "Not for:", "", *(f"- {x}" for x in card.out_of_scope), "",
        "## Data", "", f"Training: {card.training_data}", "", f"Evaluation: {card.evaluation_data}", "",
        "## Features", "", "| feature | description | source | direction | personal |", "|---|---|---|---|---|",
        *(f"| {f.name} | {_cell(f.description)} | {f.source} | {f.monotone} | {'yes' if f.personal else 'no'} |" for f in card.features),
        "", "## Metrics", "", "On the newest rows, with 95 % intervals.", "", "| metric | value | interval |", "|---|---|---|",
        *(f"| {m.name} | {m.value:g} | {_interval(m)} |" for m in card.metrics), "",
        "## Slices", "", card.slices, "", "## Fairness", "", card.fairness, "", "## Calibration", "", card.calibration, "",
        "## Robustness", "", card.robustness, "", "## Gates", "", "| gate | verdict | limit | finding |", "|---|---|---|---|",
        *(f"| {g.name} | {g.verdict} | {_cell(g.limit)} | {_cell(g.message)} |" for g in card.gates), "",
        "## Limitations", "", *(f"- {x}" for x in card.limitations), "", "## Personal data", "", card.personal_data, "",
    ]
    return "\n".join(lines)


def _interval(m: CardMetric) -> str:
    return "" if m.lower is None or m.upper is None else f"{m.lower:g} to {m.upper:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
