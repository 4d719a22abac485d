"""Contract → the text of a Feast repo: `feature_store.yaml` and `definitions.py`, which import nothing of ours.

What Feast needs to know follows from the contract alone, so `feast apply` in that folder does the same as our own `apply`.
The offline store is duckdb: Feast's default one (dask) drops training rows that have no value, which changes the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta

import yaml

from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import Feature, FromView, ModelContract, View

EVENT_TIMESTAMP = "event_timestamp"
AS_OF = "hafnium_as_of_us"
"""Extra field (the row's own time, microseconds since 1970: exact in a float64 until the year 2255), only in views where an age
is not Feast's ttl. Feast has one ttl per view and does not return the timestamp, so the join blanks what is too old itself."""
REGISTRY, ONLINE, DEFINITIONS, CONFIG, SOURCES = "registry.db", "online.db", "definitions.py", "feature_store.yaml", "sources"

_FEAST_TYPES = {"float": "Float64", "int": "Float64", "bool": "Bool", "category": "String"}
"""Whole numbers too are Float64: Feast's Int64 has no room for a missing value in a pandas column."""


@dataclass(frozen=True)
class ViewSpec:
    """A view as Feast sees it."""

    view: View
    join_key: str
    fields: tuple[tuple[str, Feature], ...]
    """Field → one of the features that read it (for the type), each field once."""
    ttl: timedelta
    """Feast's: the longest of the view's and its features' ages, rounded up to what Feast can express."""
    has_as_of: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields in Feast, `AS_OF` included."""
        return (*(name for name, _ in self.fields), *((AS_OF,) if self.has_as_of else ()))


def project_name(contract: ModelContract) -> str:
    return contract.name.replace("-", "_")


def service_name(contract: ModelContract) -> str:
    """FeatureService: `<project>_v<contract version>`, with what Feast doesn't take in a name made an underscore."""
    return f"{project_name(contract)}_v{re.sub(r'[^A-Za-z0-9_]', '_', contract.version)}"


def field_of(feature: Feature) -> str:
    assert isinstance(feature.source, FromView)  # noqa: S101 - callers pass features of a view
    return feature.source.field


def view_specs(contract: ModelContract) -> tuple[ViewSpec, ...]:
    """Views that a feature reads from, in contract order. A view that none reads is left out."""
    out: list[ViewSpec] = []
    for view in contract.views:
        features = contract.features_of(view.name)
        if not features:
            continue
        fields: dict[str, Feature] = {}
        for f in features:
            _check_field(view, field_of(f))
            first = fields.setdefault(field_of(f), f)
            if _FEAST_TYPES[first.dtype] != _FEAST_TYPES[f.dtype]:
                raise InputError(
                    f"view {view.name}: field {field_of(f)} is read as {first.dtype} by {first.name} and as {f.dtype} by {f.name}"
                )
        ages = [view.max_age if f.max_age is None else f.max_age for f in features]
        ttl = _expressible(max(ages))
        has_as_of = any(age != ttl for age in ages)
        join_key = contract.entity(view.entity).join_key
        if join_key in fields or EVENT_TIMESTAMP in fields:
            raise InputError(f"view {view.name}: a field can't be called {join_key} or {EVENT_TIMESTAMP}")
        out.append(ViewSpec(view, join_key, tuple(fields.items()), ttl, has_as_of))
    return tuple(out)


def _expressible(age: timedelta) -> timedelta:
    """The shortest ttl that is no shorter: whole days, or whole seconds below a day.

    Feast's duckdb store fails at 36 h (ibis takes no interval of mixed units) and takes 0 for "never expires" (feast 0.67).
    """
    unit = timedelta(days=1) if age > timedelta(days=1) else timedelta(seconds=1)
    return max(-(-age // unit), 1) * unit


def _check_field(view: View, name: str) -> None:
    if name.endswith("_y"):
        # Feast's duckdb join names its own duplicates `…_y` and then drops whatever ends so (feast 0.67, ibis.py).
        raise InputError(f"view {view.name}: field {name!r} ends in `_y`, and Feast loses such fields in joins; rename the field")


def feature_store_yaml(contract: ModelContract, *, redis: str | None = None) -> str:
    """`redis`: connection string (`host:port[,password=…]`) of the online store; None = SQLite in the folder."""
    online = {"type": "sqlite", "path": ONLINE} if redis is None else {"type": "redis", "connection_string": redis}
    return yaml.safe_dump({
        "project": project_name(contract),
        "provider": "local",
        # 0 = the cache never expires: a server refreshes it in its own time and not within a request
        "registry": {"path": REGISTRY, "cache_ttl_seconds": 0},
        "offline_store": {"type": "duckdb"},
        "online_store": online,
        "entity_key_serialization_version": 3,
    }, sort_keys=False)


def definitions_text(contract: ModelContract) -> str:
    """Python source with Feast's objects. Generated; a change belongs in the contract."""
    specs = view_specs(contract)
    head = f"# Generated by `hafnium features apply` from the contract {contract.name}, version {contract.version!r}. Never edit.\n"
    if not specs:
        return head + "\n# This contract has no views: there is nothing to look up.\n"
    entities = {s.view.entity: contract.entity(s.view.entity) for s in specs}
    types = sorted({_FEAST_TYPES[f.dtype] for s in specs for _, f in s.fields} | {"Float64"})
    lines = [
        head,
        "from datetime import timedelta",
        "from pathlib import Path",
        "",
        "from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType",
        f"from feast.types import {', '.join(types)}",
        "",
        "# Feast's duckdb store reads a relative path from the working directory, whatever that is.",
        f'SOURCES = Path(__file__).resolve().parent / "{SOURCES}"',
    ]
    for e in entities.values():
        lines += ["", f"entity_{e.name} = Entity(", f"    name={e.name!r},", f"    join_keys=[{e.join_key!r}],",
                  "    value_type=ValueType.STRING,", f"    description={e.description!r},", ")"]
    for s in specs:
        lines += ["", f"view_{s.view.name} = FeatureView(", f"    name={s.view.name!r},",
                  f"    entities=[entity_{s.view.entity}],",
                  f"    ttl=timedelta(seconds={s.ttl.total_seconds()!r}),", "    schema=["]
        lines += [f"        Field(name={name!r}, dtype={_FEAST_TYPES[f.dtype]}, description={f.description!r}),"
                  for name, f in s.fields]
        if s.has_as_of:
            lines.append(f"        Field(name={AS_OF!r}, dtype=Float64, description='time of the row, us since 1970'),")
        lines += ["    ],", "    source=FileSource(", f"        name={s.view.name + '_source'!r},",
                  f"        path=str(SOURCES / {s.view.name + '.parquet'!r}),",
                  f"        timestamp_field={EVENT_TIMESTAMP!r},", "    ),",
                  f"    description={s.view.description!r},", f"    owner={contract.owner!r},", ")"]
    names = [f"view_{s.view.name}[{[name for name, _ in s.fields]!r}]" for s in specs]
    lines += ["", "service = FeatureService(", f"    name={service_name(contract)!r},",
              f"    features=[{', '.join(names)}],", f"    owner={contract.owner!r},", ")", ""]
    return "\n".join(lines)
