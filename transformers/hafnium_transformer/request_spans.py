"""What the span of a request says. Facts about the answer only: no value of a feature, no entity, no text of an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hafnium_transformer.errors import ScoringError
from hafnium_transformer.scoring import Result, Scorer

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Value

_NAMES = {"/v1/score": "POST /v1/score", "/v1/score/batch": "POST /v1/score/batch"}


def span_name(path: str) -> str:
    """Of a request to one of our paths."""
    return _NAMES.get(path) or f"POST {path}"


def request_facts(path: str, request_id: str, arm: str) -> dict[str, Value]:
    """Known when the request has arrived. The path is one of ours: it holds nothing that a caller chose."""
    return {"http.request.method": "POST", "http.route": path, "url.path": path, "hafnium.request_id": request_id, "hafnium.arm": arm}


def model_facts(scorer: Scorer) -> dict[str, Value]:
    """What is in force when the request is answered. Which model scored it, the prediction's span says."""
    served = scorer.served
    if served is None:
        return {}
    return {
        "hafnium.model.name": served.contract.name, "hafnium.model.version": served.model_version,
        "hafnium.model.digest": served.model_digest,
    }


def batch_facts(results: Sequence[Result]) -> dict[str, Value]:
    """Of the rows of one request: how many, how many failed, and which features any of them did without."""
    scored = [r for r in results if not isinstance(r, ScoringError)]
    degraded = sorted({name for r in scored for name in r["degraded"]})
    return {"hafnium.rows": len(results), "hafnium.rows_failed": len(results) - len(scored), "hafnium.degraded": degraded}
