"""Errors of the predictor; each knows its HTTP status.

HafniumError
└── AnswerError                 a request ends here with a problem document
    ├── RowsError              400  the tensor is not what the model takes
    ├── ContractMismatchError  409  the row was encoded for another contract
    ├── NotReadyError          503  no model is loaded; the reason says why
    ├── DeadlineError          504  the caller's time was over when its request arrived
    └── ModelFailureError      500  the graph failed on valid input, or gave something that is no score
"""

from __future__ import annotations

from hafnium_contract.errors import HafniumError


class AnswerError(HafniumError):
    """Base. `kind` is the value of the metric label `type`."""

    status = 500
    title = "Internal error"
    kind = "internal"


class RowsError(AnswerError):
    status = 400
    title = "Bad request"
    kind = "bad_request"


class ContractMismatchError(AnswerError):
    status = 409
    title = "Other contract"
    kind = "contract_mismatch"


class NotReadyError(AnswerError):
    status = 503
    title = "Model not ready"
    kind = "not_ready"


class DeadlineError(AnswerError):
    status = 504
    title = "Deadline exceeded"
    kind = "deadline"


class ModelFailureError(AnswerError):
    status = 500
    title = "Model failure"
    kind = "model"
