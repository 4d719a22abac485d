"""Errors of the transformer; each knows its HTTP status and the metric label `type` it is counted under.

HafniumError
└── ScoringError                a request, or one row of a batch, ends here with a problem document
    ├── MalformedError          400  not JSON, not the form of a request
    ├── SlowBodyError           408  the body did not come in time
    ├── NotSupportedError       501  KServe's SDK knows the request and does not do it (model versions)
    ├── RowInvalidError         422  fields break the contract; `errors` names each
    ├── RateLimitedError        429  this client asked for too many rows
    ├── OverloadedError         503  more requests than can be answered in time
    ├── UnavailableError        503  predictor, feature store or contract can't be had
    │   └── LookedUpError       503  a value that the contract demands is missing or stale in its view
    │       └── StoreSilentError    503  nobody knows whether it is: the store did not answer
    ├── DeadlineError           504  the time that was given is over
    ├── RefusedError            4xx  the predictor refused the row; its status is kept
    └── ContractChangedError    409  the predictor has another contract; fetched anew and tried again once
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hafnium_contract.errors import HafniumError, Problem
from hafnium_contract.wire import STORE_SILENT, problem


class ScoringError(HafniumError):
    """Base."""

    status = 500
    title = "Internal error"
    kind = "internal"
    retry_after_s = 1.0
    """For answers of 429 and 503."""

    def __init__(self, detail: str, problems: Sequence[Problem] = ()) -> None:
        self.detail = detail
        self.problems = tuple(problems)
        super().__init__(detail)

    @property
    def errors(self) -> list[dict[str, Any]] | None:
        """`errors` of the problem document."""
        return [{"path": p.path, "message": p.message} for p in self.problems] or None

    def document(self) -> dict[str, Any]:
        """RFC 9457 document."""
        return problem(self.status, self.title, self.detail, self.errors)


class MalformedError(ScoringError):
    status = 400
    title = "Bad request"
    kind = "bad_request"


class SlowBodyError(ScoringError):
    status = 408
    title = "Request timeout"
    kind = "slow_body"


class NotSupportedError(ScoringError):
    status = 501
    title = "Not implemented"
    kind = "not_implemented"


class RowInvalidError(ScoringError):
    status = 422
    title = "Row breaks the contract"
    kind = "invalid_row"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(p) for p in list(problems)[:5]), problems)


class OverloadedError(ScoringError):
    status = 503
    title = "Overloaded"
    kind = "overloaded"


class RateLimitedError(ScoringError):
    status = 429
    title = "Too many requests"
    kind = "rate_limited"

    def __init__(self, detail: str, wait_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = wait_s


class UnavailableError(ScoringError):
    status = 503
    title = "Not available"
    kind = "unavailable"


class LookedUpError(UnavailableError):
    title = "Feature not available"
    kind = "feature_unavailable"

    def __init__(self, detail: str, problems: Sequence[Problem] = (), features: Sequence[str] = ()) -> None:
        self.features = tuple(features)
        super().__init__(detail, problems)


class StoreSilentError(LookedUpError):
    """Its title tells callers that it may pass; it counts as its base does."""

    title = STORE_SILENT


class DeadlineError(ScoringError):
    status = 504
    title = "Deadline exceeded"
    kind = "deadline"


class RefusedError(ScoringError):
    title = "Refused by the predictor"
    kind = "refused"

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(detail)


class ContractChangedError(ScoringError):
    status = 409
    title = "Other contract"
    kind = "contract_mismatch"
