"""What the span of a request says: which model, how many rows. No value of a row, no text of an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hafnium_contract.trace_context import REQUEST_ID, request_ids_of
from hafnium_predictor.engine import Engine

if TYPE_CHECKING:
    from hafnium_contract.telemetry.spans import Value


def request_facts(path: str, headers: Mapping[bytes, bytes]) -> dict[str, Value]:
    """Known when the request has arrived. `path`: one of ours; '' by gRPC."""
    facts: dict[str, Value] = {"http.request.method": "POST", "http.route": path, "url.path": path} if path else {}
    request_id = request_ids_of(headers.get(REQUEST_ID))
    if request_id:
        facts["hafnium.request_id"] = request_id
    return facts


def model_facts(engine: Engine) -> dict[str, Value]:
    """The model that answered."""
    manifest = engine.bundle.manifest
    return {
        "hafnium.model.name": manifest.model_name, "hafnium.model.version": manifest.model_version,
        "hafnium.model.digest": manifest.digest, "hafnium.contract.digest": manifest.contract_digest,
    }
