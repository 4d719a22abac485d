"""One request's JSON → a frozen row, checked against the contract. All that is wrong is named at once, each with its path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

from hafnium_contract.encoding import encode_value
from hafnium_contract.errors import FeatureError, Problem
from hafnium_contract.model_contract import Feature
from hafnium_transformer.errors import RowInvalidError
from hafnium_transformer.online_store.records import EntityValue
from hafnium_transformer.plan import ENTITY_NUMBER, ENTITY_TEXT, Plan

KEYS = frozenset({"request_id", "event_time", "entity", "features", "explain"})
_YEAR_1_S, _YEAR_10000_S = datetime(1, 1, 1, tzinfo=UTC).timestamp(), datetime(9999, 12, 31, tzinfo=UTC).timestamp() + 86_400.0
UNKNOWN_SHOWN_MAX = 50
"""Of one object's unknown keys. A body of 4 MB has 400,000, and an answer that named all of them would be fifteen times as long."""
TEXT_MAX = 256
"""Characters of a request id or an entity key: they are logged, hashed and sent to the store."""

NUMBER_AS_TEXT = "^(0|-?[1-9][0-9]{0,18})$"
"""The one way to write a key of the store that is a number: 0763, 1.0 and 1e3 may be somebody else's."""
_NUMBER_AS_TEXT = re.compile(NUMBER_AS_TEXT)
_NUMBER_FORM = f"{ENTITY_NUMBER} of 64 bits, as a number or its plain text, such as \"1001\""


class Lacking(NamedTuple):
    """What a row has to do without."""

    degraded: tuple[str, ...]
    """Missing features whose policy is `degrade`: the answer names them."""
    missing: tuple[str, ...]
    """Features that are missing, stale or unusable, whatever the policy: for counting."""


NOTHING = Lacking((), ())
"""The usual row lacks nothing, and has this very object."""


class Row(NamedTuple):  # made for every row: a frozen dataclass takes four times as long
    """A valid request. `values`: encoded request features by name, NaN = missing."""

    request_id: str
    event_time_s: float
    """Seconds since 1970-01-01 UTC."""
    entity: dict[str, EntityValue]
    values: dict[str, float]
    lacking: Lacking
    """Of its request features."""
    explain: bool


def parse_row(plan: Plan, data: Any, *, request_id: str, now_s: float, path: str = "") -> Row:
    """JSON data → Row. `request_id` and `now_s` (since 1970) stand in for what it doesn't give; `path` goes before each path.

    Raises RowInvalidError with all problems.
    """
    problems: list[Problem] = []
    if not isinstance(data, dict):
        raise RowInvalidError([Problem(path, f"expected an object with features, got {_shown(data)}")])
    body = cast(dict[str, Any], data)
    prefix = path + "." if path else ""
    if not body.keys() <= KEYS:
        expected = ", ".join(sorted(KEYS))
        _unknown([key for key in body if key not in KEYS], path, lambda _: f"unknown field; expected {expected}", problems)
    given_id = body.get("request_id")
    if given_id is not None:
        if isinstance(given_id, str) and 0 < len(given_id) <= TEXT_MAX:
            request_id = given_id
        else:
            problems.append(Problem(prefix + "request_id", f"expected 1 to {TEXT_MAX} characters, got {_shown(given_id)}"))
    event_time_s = _event_time(body.get("event_time"), now_s, prefix, problems)
    explain = body.get("explain", False)
    if not isinstance(explain, bool):
        problems.append(Problem(prefix + "explain", f"expected true or false, got {_shown(explain)}"))
    entity = _entity(plan, body.get("entity"), prefix, problems)
    values, lacking = _features(plan, body.get("features"), prefix, problems)
    if problems:
        raise RowInvalidError(problems)
    return Row(request_id, event_time_s, entity, values, lacking, bool(explain))


def _event_time(given: Any, now_s: float, prefix: str, problems: list[Problem]) -> float:
    if given is None:
        return now_s
    seconds = plain_event_time(given)
    if seconds is not None:
        return seconds
    expected = "expected RFC 3339 time with an offset, such as 2026-01-15T12:00:00Z"
    problems.append(Problem(prefix + "event_time", f"{expected}, got {_shown(given)}"))
    return math.nan


def plain_event_time(given: Any) -> float | None:
    """RFC 3339 with an offset → seconds since 1970; None: it is something else."""
    if isinstance(given, str) and len(given) <= 40:
        try:
            when = datetime.fromisoformat(given)
            if when.tzinfo is not None:
                seconds = when.timestamp()
                if _YEAR_1_S <= seconds < _YEAR_10000_S:
                    return seconds
        except (ValueError, OverflowError):
            pass
    return None


def is_key(value: Any, expected: str | None) -> bool:
    """Whether an entity can be looked up by it as it is. `expected`: ENTITY_TEXT, ENTITY_NUMBER, or None when the store does not say."""
    if type(value) is str:
        return 0 < len(value) <= TEXT_MAX and expected != ENTITY_NUMBER
    return type(value) is int and abs(value) < 2**63 and expected != ENTITY_TEXT


def _key(value: Any, expected: str | None) -> Any:
    """A text that stands for a number of the store is that number: CSVs, V2's BYTES and other systems have keys as texts."""
    if expected == ENTITY_NUMBER and type(value) is str and _NUMBER_AS_TEXT.fullmatch(value):
        return int(value)
    return value


def _entity(plan: Plan, given: Any, prefix: str, problems: list[Problem]) -> dict[str, EntityValue]:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        problems.append(Problem(prefix + "entity", f"expected an object, got {_shown(given)}"))
        return {}
    entity = cast(dict[str, Any], given)
    out: dict[str, EntityValue] = {}
    if not entity.keys() <= plan.declared_keys:
        known = ", ".join(sorted(plan.declared_keys)) or "none"
        unknown = [key for key in entity if key not in plan.declared_keys]
        _unknown(unknown, prefix + "entity", lambda _: f"unknown entity key; the contract's are: {known}", problems)
    for key, value in entity.items():
        if value is not None and key in plan.declared_keys:
            expected = plan.entity_types.get(key)
            found = _key(value, expected)
            if is_key(found, expected):
                out[key] = found
            else:
                form = f"a string of 1 to {TEXT_MAX} characters" if expected != ENTITY_NUMBER else _NUMBER_FORM
                problems.append(Problem(f"{prefix}entity.{key}", f"expected {form}, got {_shown(value)}"))
    if not out.keys() >= plan.needed_keys:
        problems.extend(
            Problem(f"{prefix}entity.{key}", "missing; features are looked up by it")
            for key in plan.join_keys if entity.get(key) is None
        )
    return out


def _features(
    plan: Plan, given: Any, prefix: str, problems: list[Problem],
) -> tuple[dict[str, float], Lacking]:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        problems.append(Problem(prefix + "features", f"expected an object, got {_shown(given)}"))
        return {}, NOTHING
    features: Mapping[str, Any] = cast(dict[str, Any], given)
    values: dict[str, float] = {}
    if len(features) == len(plan.plain_fields):  # the usual row: all there, all plainly good
        for name, feature_name, plain in plan.plain_fields:
            value = plain(features.get(name))
            if value is None:
                break
            values[feature_name] = value
        else:
            return values, NOTHING
    if not features.keys() <= plan.fields:
        known = ", ".join(sorted(plan.fields))[:400]
        unknown = [key for key in features if key not in plan.fields]
        _unknown(unknown, prefix + "features", lambda key: _no_field(plan, key, known), problems)
    degraded: list[str] = []
    missing: list[str] = []
    for name, feature in plan.request_features:
        path = f"{prefix}features.{name}"
        try:
            value = encode_value(feature, features.get(name), path)
        except FeatureError as e:
            problems.extend(e.problems)
            continue
        if math.isnan(value):
            missing.append(feature.name)
            if feature.missing == "reject":
                problems.append(Problem(path, f"missing; expected {expected_form(feature)}"))
            elif feature.missing == "degrade":
                degraded.append(feature.name)
        values[feature.name] = value
    return values, Lacking(tuple(degraded), tuple(missing)) if missing else NOTHING


def _unknown(keys: Sequence[str], path: str, why: Callable[[str], str], problems: list[Problem]) -> None:
    """Names keys of the object at `path` that nobody knows."""
    problems.extend(Problem(f"{path}.{key[:80]}".lstrip("."), why(key)) for key in keys[:UNKNOWN_SHOWN_MAX])
    if len(keys) > UNKNOWN_SHOWN_MAX:
        problems.append(Problem(path, f"{len(keys) - UNKNOWN_SHOWN_MAX} more unknown fields"))


def _no_field(plan: Plan, key: str, known: str) -> str:
    if key in plan.protected:
        return "protected attribute: kept for evaluation, never an input"
    feature = plan.contract.by_name.get(key)
    if feature is not None:
        return "not sent by the caller: the contract looks it up or computes it"
    return f"unknown feature; the contract takes {known}"


def expected_form(feature: Feature) -> str:
    """What a valid value is, in words."""
    if feature.dtype == "category":
        return "a string, such as " + feature.categories[0]
    if feature.dtype == "bool":
        return "true or false"
    low, high = feature.range or (-math.inf, math.inf)
    unit = "" if feature.unit == "1" else f" {feature.unit}"
    return f"{'a whole number' if feature.dtype == 'int' else 'a number'} from {low:g} to {high:g}{unit}"


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
