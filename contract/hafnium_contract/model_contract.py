"""The model contract: every feature named once, and everything else derived from it.

A contract is a YAML file (`examples/*/contract.yaml`). It is parsed at the edge into the frozen types below; nothing
downstream reads YAML again. Request validation, Feast retrieval, training columns, monotone constraints, the ONNX input
order, the drift report's columns and the documentation all follow from `ModelContract.features`.
"""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from hafnium_contract.durations import Duration

SCHEMA_VERSION = 1
NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,62}$"
MODEL_NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$"
"""A DNS label with room for `-<digest8>-transformer`, because the model's name becomes an InferenceService's."""
FEATURES_MAX = 2_000
CATEGORIES_MAX = 10_000
FLOAT_MAX = (2.0 - 2.0**-23) * 2.0**127
"""float32's largest number. The graph takes float32: a larger one would be infinity there."""

FeatureName = Annotated[str, Field(pattern=NAME_PATTERN)]


class Strict(BaseModel):
    """camelCase in files, snake_case in code, frozen, and an unknown key is an error (a misspelt key is never ignored)."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True,
        extra="forbid", frozen=True, use_attribute_docstrings=True,
    )


class EventTime(Strict):
    """When a row's event happened. A text or timestamp column needs only `column`; a number needs `unit` and `origin`."""

    column: str
    unit: Literal["s", "ms", "m", "h", "d"] | None = None
    """What a numeric column counts."""
    origin: AwareDatetime = datetime(1970, 1, 1, tzinfo=UTC)
    """The moment that a numeric column calls 0."""


class Label(Strict):
    """The column that says what turned out to be true: 1 for the event that the score estimates (fraud), else 0."""

    column: str


class LabelTime(Strict):
    """When the label became known: a column, or a fixed delay after the event. Training uses only labels known by then."""

    column: str | None = None
    delay: Duration | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.column is None) == (self.delay is None):
            raise ValueError("give exactly one of `column` and `delay`")
        return self


class DataColumns(Strict):
    """Which columns of the data file are not features."""

    event_time: EventTime
    label: Label
    label_time: LabelTime
    request_id: str | None = None
    """Column with the transaction's id; without it the row number is used."""


class Entity(Strict):
    """Something that features are kept for (a customer, a terminal), under the key that requests name it by."""

    name: FeatureName
    join_key: FeatureName
    description: str = ""


class View(Strict):
    """A Feast feature view: values per entity, looked up when a request comes."""

    name: FeatureName
    entity: FeatureName
    max_age: Duration
    """Older values count as missing. Feast does not enforce this online, the transformer does."""
    description: str = ""


class FromRequest(Strict):
    """The caller sends it, under the feature's own name or under `request`."""

    request: FeatureName


class FromView(Strict):
    """Looked up: field `field` of the Feast view `view`."""

    view: FeatureName
    field: FeatureName


class Derived(Strict):
    """Computed from other features of the contract (or from `event_time`), the same in training and in serving."""

    operation: Literal["ratio", "difference", "sum", "product", "log1p", "hour_of_day", "day_of_week"]
    inputs: tuple[FeatureName, ...]

    @model_validator(mode="after")
    def _arity(self) -> Self:
        wanted = {"log1p": 1, "hour_of_day": 1, "day_of_week": 1, "ratio": 2, "difference": 2}.get(self.operation)
        if wanted is not None and len(self.inputs) != wanted:
            raise ValueError(f"operation {self.operation} takes {wanted} input(s), {len(self.inputs)} given")
        if wanted is None and len(self.inputs) < 2:
            raise ValueError(f"operation {self.operation} takes two or more inputs")
        of_time = self.operation in ("hour_of_day", "day_of_week")
        if of_time != (self.inputs == ("event_time",)):
            raise ValueError("hour_of_day and day_of_week take the input event_time, and nothing else may")
        return self


class FromDerived(Strict):
    derived: Derived


class Drift(Strict):
    """How drift of this feature is judged. `threshold` is the effect that counts as drift, in the test's own unit."""

    test: Literal["psi", "none"] = "psi"
    threshold: float = Field(default=0.1, gt=0, le=10)


class Feature(Strict):
    """One input of the model: type, unit, range, source, owner, direction, and what to do when it is not there."""

    name: FeatureName
    description: str = Field(min_length=1)
    dtype: Literal["float", "int", "bool", "category"]
    unit: str = "1"
    """Unit of measure: an ISO 4217 code for money (`EUR`), `count`, `d`, `1` for none."""
    range: tuple[float, float] | None = None
    """Smallest and largest valid value, both included. Required for float and int."""
    out_of_range: Literal["reject", "clamp"] = "reject"
    """`reject` refuses the request; `clamp` lets the graph move the value to the nearest bound."""
    categories: tuple[str, ...] = ()
    """Known values of a category, in the order of their codes. Others share one code of their own (unknown)."""
    missing: Literal["reject", "impute", "degrade"] = "reject"
    """`reject` refuses; `impute` lets the graph fill it in; `degrade` does too and names the feature in the answer."""
    source: FromRequest | FromView | FromDerived | None = None
    """Without it, the caller sends the feature under its own name."""
    max_age: Duration | None = None
    """Overrides the view's."""
    monotone: Literal["increasing", "decreasing", "none"] = "none"
    """The score never falls (rises) when this rises. Guaranteed by the network's construction."""
    personal: bool = False
    """Personal data: never logged, never in a reference sample."""
    model_input: bool = True
    """False for a value that only feeds derived features."""
    drift: Drift = Drift()
    owner: str = ""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.dtype in ("float", "int"):
            if self.range is None:
                raise ValueError(f"a {self.dtype} feature needs a range: [smallest, largest]")
            if not all(abs(bound) <= FLOAT_MAX for bound in self.range):  # not so for NaN either
                raise ValueError(f"range must be of finite numbers up to {FLOAT_MAX:.7g}, float32's largest, got {list(self.range)}")
            if not self.range[0] < self.range[1]:
                raise ValueError(f"range must rise, got {list(self.range)}")
        elif self.range is not None:
            raise ValueError(f"a {self.dtype} feature has no range")
        if (self.dtype == "category") != bool(self.categories):
            raise ValueError("a category feature, and only one, lists its categories")
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("categories repeat")
        if len(self.categories) > CATEGORIES_MAX:
            raise ValueError(f"{len(self.categories)} categories, at most {CATEGORIES_MAX}")
        if self.dtype == "category" and self.monotone != "none":
            raise ValueError("a category has no order, so it can't be monotone")
        return self

    @property
    def request_field(self) -> str | None:
        """Name in the request, or None when it is looked up or computed."""
        if self.source is None:
            return self.name
        return self.source.request if isinstance(self.source, FromRequest) else None

    @property
    def is_money(self) -> bool:
        return re.fullmatch(r"[A-Z]{3}", self.unit) is not None


class Protected(Strict):
    """An attribute kept for fairness evaluation only. It can't be an input."""

    name: FeatureName
    description: str = ""


class DecisionRule(Strict):
    """score ≥ threshold → `above`, else `below`."""

    threshold: float = Field(gt=0, lt=1)
    above: str = "review"
    below: str = "approve"


class ModelContract(Strict):
    """Agreement between who trains a model, who calls it and who watches it."""

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=MODEL_NAME_PATTERN)]
    version: str = Field(min_length=1)
    owner: str = Field(min_length=1)
    description: str = Field(min_length=1)
    data: DataColumns
    entities: tuple[Entity, ...] = ()
    views: tuple[View, ...] = ()
    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=FEATURES_MAX)]
    protected: tuple[Protected, ...] = ()
    decision: DecisionRule

    @model_validator(mode="after")
    def _references(self) -> Self:
        for what, names in (
            ("feature", [f.name for f in self.features]), ("view", [v.name for v in self.views]),
            ("entity", [e.name for e in self.entities]), ("protected attribute", [p.name for p in self.protected]),
        ):
            repeated = sorted({n for n in names if names.count(n) > 1})
            if repeated:
                raise ValueError(f"{what} named twice: {', '.join(repeated)}")
        entities = {e.name for e in self.entities}
        for v in self.views:
            if v.entity not in entities:
                raise ValueError(f"view {v.name}: entity {v.entity!r} is not declared; entities: {sorted(entities)}")
        known = {f.name: f for f in self.features}
        views = {v.name for v in self.views}
        overlap = sorted(set(known) & {p.name for p in self.protected})
        if overlap:
            raise ValueError(f"protected attribute as a feature: {', '.join(overlap)}; it may be used for evaluation only")
        if self.data.label.column in known:
            raise ValueError(f"the label column {self.data.label.column!r} is also a feature")
        self._refuse_leaks()
        if not any(f.model_input for f in self.features):
            raise ValueError("no feature has modelInput: true")
        seen: set[str] = {"event_time"}
        for f in self.features:
            if isinstance(f.source, FromView) and f.source.view not in views:
                raise ValueError(f"feature {f.name}: view {f.source.view!r} is not declared; views: {sorted(views)}")
            if isinstance(f.source, FromDerived):
                for name in f.source.derived.inputs:
                    if name not in seen:
                        raise ValueError(f"feature {f.name}: input {name!r} must be a feature declared above it")
                    if name in known and known[name].dtype == "category":
                        raise ValueError(f"feature {f.name}: input {name!r} is a category, not a number")
            seen.add(f.name)
        return self

    def _refuse_leaks(self) -> None:
        """By what a feature is read from: its name may be another."""
        data = self.data
        forbidden = {p.name: "is a protected attribute, which may be used for evaluation only" for p in self.protected}
        forbidden |= {e.join_key: f"is the join key of entity {e.name}, a name and not a property" for e in self.entities}
        if data.request_id is not None:
            forbidden[data.request_id] = "is the request's id"
        forbidden[data.event_time.column] = "is the event time; derive hour_of_day or day_of_week from event_time"
        if data.label_time.column is not None:
            forbidden[data.label_time.column] = "is the label's time, which is not known when a request comes"
        forbidden[data.label.column] = "is the label, which is not known when a request comes"
        for f in self.features:
            # a view's column has the feature's name in a flat file, and the field's in the view
            read = (f.source.field, f.name) if isinstance(f.source, FromView) else (f.request_field,)
            for column in read:
                if column in forbidden:
                    raise ValueError(f"feature {f.name}: is read from {column!r}, which {forbidden[column]}")

    @cached_property
    def inputs(self) -> tuple[Feature, ...]:
        """Features in the order of the ONNX input's columns."""
        return tuple(f for f in self.features if f.model_input)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.inputs)

    @cached_property
    def by_name(self) -> dict[str, Feature]:
        return {f.name: f for f in self.features}

    @cached_property
    def request_fields(self) -> dict[str, Feature]:
        """Field of a request → its feature."""
        return {f.request_field: f for f in self.features if f.request_field is not None}

    def features_of(self, view: str) -> tuple[Feature, ...]:
        """Features that are read from the view, in contract order."""
        return tuple(f for f in self.features if isinstance(f.source, FromView) and f.source.view == view)

    def view(self, name: str) -> View:
        return next(v for v in self.views if v.name == name)

    def entity(self, name: str) -> Entity:
        return next(e for e in self.entities if e.name == name)

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of the parsed contract's canonical JSON: comments and layout don't count, meaning does."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
