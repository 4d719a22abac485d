"""A valid row and what the store has for it → encoded values, by the contract's policy for what is missing, stale or unusable.

Pure. `reject` makes the row an error, `impute` leaves it to the graph without a word, `degrade` does so and says it in the answer.
A value that should be there but could not be read at all (the store is gone) always degrades: that is no usual absence.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hafnium_contract.encoding import encode_value
from hafnium_contract.errors import FeatureError, Problem
from hafnium_transformer.errors import LookedUpError, RowInvalidError, StoreSilentError
from hafnium_transformer.online_store.records import Found
from hafnium_transformer.plan import LookedUp, Plan, ViewPlan
from hafnium_transformer.rows import Lacking, Row, expected_form

CLOCK_SKEW_S = 300.0
"""A value this much younger than the event is from the future; less is two clocks that differ."""


def encode_row(plan: Plan, row: Row, found: Found | None) -> tuple[dict[str, float], Lacking]:
    """Encoded features by name, NaN = missing, without derived ones; and what the row lacks.

    `found`: None when the store could not be asked. Raises LookedUpError for a value that the contract demands; StoreSilentError then.
    """
    if not plan.views:
        return row.values, row.lacking
    values = dict(row.values)
    degraded: list[str] = []
    missing: list[str] = []
    problems: list[Problem] = []
    event_time_s = row.event_time_s
    for view in plan.views:
        for looked_up in view.features:
            name = looked_up.feature.name
            item = None if found is None else found.get(looked_up.column)
            if item is not None and -CLOCK_SKEW_S <= event_time_s - item[1] <= looked_up.max_age_s:
                value = looked_up.plain(item[0])
                if value is not None:
                    values[name] = value
                    continue
            value, wrong, usual = _value(view, looked_up, row, found)
            values[name] = value
            if wrong:
                missing.append(name)
                policy = looked_up.feature.missing
                if policy == "reject":
                    problems.append(Problem(looked_up.column.replace("__", ".", 1), wrong))
                elif policy == "degrade" or not usual:
                    degraded.append(name)
    if problems:
        views = sorted({p.path.split(".")[0] for p in problems})
        raise _looked_up(found is None)(f"view {', '.join(views)}: {problems[0].path} {problems[0].message}", problems, missing)
    return values, _and(row.lacking, degraded, missing)


def _looked_up(silent: bool) -> type[LookedUpError]:
    return StoreSilentError if silent else LookedUpError


def _and(lacking: Lacking, degraded: list[str], missing: list[str]) -> Lacking:
    return Lacking((*lacking.degraded, *degraded), (*lacking.missing, *missing)) if missing else lacking


def _value(view: ViewPlan, looked_up: LookedUp, row: Row, found: Found | None) -> tuple[float, str, bool]:
    """(encoded value, what is wrong with it or '', whether that is the usual case of a missing or stale value)."""
    if found is None:
        return math.nan, "could not be looked up: the feature store did not answer", False
    item = found.get(looked_up.column)
    if item is None:
        return math.nan, f"has no value for {view.join_key} {row.entity.get(view.join_key)!r}", True
    raw, value_time_s = item
    age_s = row.event_time_s - value_time_s
    if age_s < -CLOCK_SKEW_S:
        return math.nan, f"is from {-age_s:.0f} s after the event: a score must not know the future", True
    if age_s > looked_up.max_age_s:
        return math.nan, f"is {age_s:.0f} s old at the event's time, the contract allows {looked_up.max_age_s:.0f} s", True
    try:
        value = encode_value(looked_up.feature, raw, looked_up.column)
    except FeatureError as e:
        return math.nan, f"in the store is not usable: {e.problems[0].message}", False
    return value, f"has no value for {view.join_key}" if math.isnan(value) else "", True


def check_derived(plan: Plan, lacking: Lacking, inputs: npt.NDArray[np.float32], *, silent: bool = False) -> Lacking:
    """Policies of derived inputs that can't be computed (an input is missing, or x/0). `inputs` [n]: the row, assembled.
    `silent`: the store could not be asked.

    Raises LookedUpError or RowInvalidError, after where the cause lies.
    """
    degraded: list[str] = []
    missing: list[str] = []
    for column, feature in plan.derived_inputs:
        if not math.isnan(inputs[column]):
            continue
        missing.append(feature.name)
        if feature.missing == "degrade":
            degraded.append(feature.name)
        elif feature.missing == "reject":
            problem = Problem(feature.name, f"can't be computed from this row; expected {expected_form(feature)}")
            views = plan.looked_up_behind[feature.name]
            if views:
                raise _looked_up(silent)(f"view {', '.join(views)}: {problem.path} {problem.message}", [problem], missing)
            raise RowInvalidError([problem])
    return _and(lacking, degraded, missing)
