"""A contract, worked out once: what a request must hold, what is looked up, what is computed and what is logged.

A request must not search the contract; it walks the tuples below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hafnium_contract.encoding import Floats, PlainColumns, number_column, plain_encoder, row_assembler
from hafnium_contract.model_contract import Feature, FromDerived, FromView, ModelContract

ENTITY_TEXT = "a string"
ENTITY_NUMBER = "a whole number"


@dataclass(frozen=True)
class LookedUp:
    """A feature that comes from a view."""

    feature: Feature
    column: str
    """Name in Feast's answer with full feature names: `view__field`."""
    max_age_s: float
    view: int
    """Its place among the views that are read."""
    plain: Callable[[Any], float | None]
    """hafnium_contract.encoding.plain_encoder of the feature."""


@dataclass(frozen=True)
class ViewPlan:
    """A view that the contract reads."""

    name: str
    join_key: str
    features: tuple[LookedUp, ...]


@dataclass(frozen=True)
class Plan:
    """What follows from a contract. `entity_types` comes from Feast's registry: join key → ENTITY_TEXT or ENTITY_NUMBER."""

    contract: ModelContract
    digest: str
    request_features: tuple[tuple[str, Feature], ...]
    """(field of the request, its feature)."""
    plain_fields: tuple[tuple[str, str, Callable[[Any], float | None]], ...]
    """(field, name of its feature, plain encoder), in the same order."""
    plain_columns: tuple[tuple[str, Callable[[Sequence[Any]], Floats]], ...]
    """(field, hafnium_contract.encoding.number_column of its feature), in the same order."""
    plain_request: PlainColumns
    """What these numbers must be."""
    fields: frozenset[str]
    protected: frozenset[str]
    views: tuple[ViewPlan, ...]
    looked_up: tuple[LookedUp, ...]
    """Of all views, in their order: the columns of a lookup."""
    plain: PlainColumns
    """Of `looked_up`: what their encoded values must be, to be plainly good."""
    max_age_s: Floats
    """Of `looked_up`, [features, 1]."""
    join_keys: tuple[str, ...]
    """Needed for the lookup."""
    needed_keys: frozenset[str]
    """The same, as a set."""
    declared_keys: frozenset[str]
    references: tuple[str, ...]
    """`view:field`, as Feast wants them."""
    assemble_row: Callable[[Mapping[str, float], float], list[float]]
    """hafnium_contract.encoding.row_assembler of the contract."""
    derived_inputs: tuple[tuple[int, Feature], ...]
    """(column, feature) of the inputs that are computed."""
    derived_columns: list[int]
    """Their columns."""
    looked_up_behind: dict[str, tuple[str, ...]]
    """Derived feature → views that its inputs come from."""
    logged_columns: tuple[int, ...]
    """Columns of the matrix that may be logged."""
    entity_types: dict[str, str] = field(default_factory=dict[str, str])


def make_plan(contract: ModelContract, entity_types: dict[str, str] | None = None) -> Plan:
    """Contract → Plan."""
    views: list[ViewPlan] = []
    references: list[str] = []
    for view in contract.views:
        looked_up: list[LookedUp] = []
        for f in contract.features_of(view.name):
            if isinstance(f.source, FromView):
                age = (f.max_age or view.max_age).total_seconds()
                looked_up.append(LookedUp(f, f"{view.name}__{f.source.field}", age, len(views), plain_encoder(f)))
                references.append(f"{view.name}:{f.source.field}")
        if looked_up:
            views.append(ViewPlan(view.name, contract.entity(view.entity).join_key, tuple(looked_up)))
    columns = tuple(f for v in views for f in v.features)
    derived = tuple((j, f) for j, f in enumerate(contract.inputs) if isinstance(f.source, FromDerived))
    return Plan(
        contract=contract, digest=contract.digest, request_features=tuple(contract.request_fields.items()),
        plain_fields=tuple((field, f.name, plain_encoder(f)) for field, f in contract.request_fields.items()),
        plain_columns=tuple((field, number_column(f)) for field, f in contract.request_fields.items()),
        plain_request=PlainColumns.of(tuple(contract.request_fields.values())),
        fields=frozenset(contract.request_fields), protected=frozenset(p.name for p in contract.protected),
        views=tuple(views), looked_up=columns, plain=PlainColumns.of([f.feature for f in columns]),
        max_age_s=np.array([[f.max_age_s] for f in columns], np.float64), join_keys=tuple(dict.fromkeys(v.join_key for v in views)),
        needed_keys=frozenset(v.join_key for v in views),
        declared_keys=frozenset(e.join_key for e in contract.entities), references=tuple(dict.fromkeys(references)),
        assemble_row=row_assembler(contract), derived_inputs=derived, derived_columns=[j for j, _ in derived],
        looked_up_behind=_views_behind(contract),
        logged_columns=tuple(j for j, f in enumerate(contract.inputs) if not f.personal),
        entity_types=dict(entity_types or {}),
    )


def _views_behind(contract: ModelContract) -> dict[str, tuple[str, ...]]:
    behind: dict[str, tuple[str, ...]] = {}
    for f in contract.features:  # inputs are declared above what is derived from them
        if isinstance(f.source, FromView):
            behind[f.name] = (f.source.view,)
        elif isinstance(f.source, FromDerived):
            views = [v for name in f.source.derived.inputs for v in behind.get(name, ())]
            behind[f.name] = tuple(dict.fromkeys(views))
    return {f.name: behind[f.name] for f in contract.features if isinstance(f.source, FromDerived)}
