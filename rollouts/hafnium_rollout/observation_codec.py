"""Observation ⇄ plain data that JSON can hold, without loss: what `decide` sees now, it must be able to see again.

The record (record.py) keeps these. Sets come out sorted, so that the same observation always gives the same data and only what
changed has to be written. NaN and infinities stay what they are: a record of bad numbers must not look like a record of none.
"""

from __future__ import annotations

from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from hafnium_rollout.errors import RecordError
from hafnium_rollout.observation import Observation

_ADAPTER = TypeAdapter(Observation)
_SETS = ("declared", "managed", "approvals")


def encode(seen: Observation) -> dict[str, Any]:
    """Observation → data of one level of keys, one per field."""
    data = cast("dict[str, Any]", _ADAPTER.dump_python(seen, mode="json"))
    for key in _SETS:
        data[key] = sorted(data[key])
    if data["live"] is not None:
        data["live"]["mirrors"] = sorted(data["live"]["mirrors"])
    data["cursor"] = dict(seen.cursor)  # JSON data already: it goes to the status as it is
    return data


def decode(data: dict[str, Any]) -> Observation:
    """Data → Observation. Raises RecordError that names the field."""
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as e:
        x = e.errors()[0]
        raise RecordError(f"not an observation: {'.'.join(str(s) for s in x['loc'])}: {x['msg']}") from e
