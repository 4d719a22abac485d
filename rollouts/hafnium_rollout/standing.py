"""What a command must know of a rollout, read from raw data: an abort has to work whatever else in spec or status can't be understood.

A command may be older than the CRD and the operator (upgrades come in stages), and a file may be broken in the middle of a rollout.
The controller itself stays strict: it moves nothing on what it can't read. Pure.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from hafnium_rollout.status import RolloutStatus

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PASSES_MAX = 3
"""One finds every unknown field; a check of the whole may come to its word only after that."""


@dataclass(frozen=True, slots=True)
class Standing:
    """As much of a status as a wish needs."""

    phase: str = ""
    candidate: str | None = None
    """Digest of the candidate; None: there is none. Empty: there is one, and its digest can't be read."""
    handled_actions: frozenset[str] = frozenset()
    doubt: str = ""
    """Why nothing could be read."""


def standing_of(status: Any) -> Standing:
    """From a status as it was stored, whoever wrote it."""
    if not isinstance(status, dict):
        return Standing(doubt=f"the status is {type(status).__name__}, expected an object") if status is not None else Standing()
    data = cast("dict[str, Any]", status)
    phase, ids = data.get("phase"), data.get("handledActions")
    return Standing(
        phase if isinstance(phase, str) else "",
        None if data.get("candidate") is None else digest_at(data, "candidate", "digest") or "",
        frozenset(str(i) for i in cast("list[Any]", ids)) if isinstance(ids, list) else frozenset(),
    )


def digest_at(data: Any, *path: str) -> str | None:
    """The digest at a path of keys; None when there is none."""
    for key in path:
        if not isinstance(data, dict):
            return None
        data = cast("dict[str, Any]", data).get(key)
    return data if isinstance(data, str) and _DIGEST.fullmatch(data) else None


def known_status(data: Any) -> tuple[RolloutStatus, tuple[str, ...]]:
    """The status without fields that this version doesn't know, and their paths. Raises ValidationError when that isn't all."""
    data, unknown = deepcopy(data), list[str]()
    for _ in range(_PASSES_MAX):
        try:
            return RolloutStatus.model_validate(data), tuple(unknown)
        except ValidationError as e:
            extra = [x["loc"] for x in e.errors() if x["type"] == "extra_forbidden"]
            if len(extra) < e.error_count():
                raise
        for loc in extra:
            parent: Any = data
            for key in loc[:-1]:
                parent = parent[key]
            del parent[loc[-1]]
            unknown.append(".".join(str(k) for k in ("status", *loc)))
    return RolloutStatus.model_validate(data), tuple(unknown)
