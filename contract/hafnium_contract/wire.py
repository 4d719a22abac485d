"""Header names and problem documents that the transformer, the predictor, the gateway and their clients agree on."""

from __future__ import annotations

from typing import Any

CONTRACT_HEADER = "x-hafnium-contract"
"""Contract digest. On a request: the contract that the row was encoded for. On an answer: the model's own."""
MODEL_VERSION_HEADER = "x-hafnium-model-version"
MODEL_DIGEST_HEADER = "x-hafnium-model-digest"
ARM_HEADER = "x-hafnium-arm"
"""Which arm the gateway chose: `stable` or `candidate`. A mirrored copy shows by its host, which ends in `-shadow`."""
REQUEST_ID_HEADER = "x-request-id"
DEADLINE_HEADER = "x-hafnium-deadline-ms"
"""Milliseconds that are left for the answer when the request is sent; each hop passes on what it has left."""

PROBLEM_JSON = "application/problem+json"
STORE_SILENT = "Feature store does not answer"
"""Title of the problem of a row that nothing could be looked up for: it may pass. That the store has no value, or an old one, does not."""
BATCH_ROWS_MAX = 1_000
BODY_BYTES_MAX = 4 * 1024 * 1024

DIGEST_LABEL = "hafnium.dev/model-digest"
"""Label of an InferenceService: the first 8 hex digits of its bundle's digest."""
VERSION_LABEL = "hafnium.dev/model-version"


def problem(status: int, title: str, detail: str, errors: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """An RFC 9457 problem document. `errors` lists fields: {"path", "message"}."""
    out: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    if errors:
        out["errors"] = errors
    return out
