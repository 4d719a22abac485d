"""Errors of the monitoring jobs.

HafniumError
└── InputError               (hafnium_contract)
    ├── LogReadError         a file of the inference log is damaged, foreign, or lacks a column
    ├── ReferenceSampleError a bundle's reference.parquet does not hold what its contract promises
    ├── LabelError           the label file is missing, or lacks a column
    ├── StateError           the state folder of the local runtime can't be understood
    ├── BusyError            another run holds the evidence folder
    ├── UnwrittenError       evidence can't be written: the folder is none, the disk is full
    ├── WrittenError         evidence of this model, kind and window is there already
    ├── PlaceError           a storageUri names a place that this job doesn't have
    └── ApiServerError       Kubernetes' API server refuses, or doesn't answer
        ├── ForbiddenError   the job's account may not do this
        └── ExistsError      there is an object of this name already

Inside a run the first three become evidence with the verdict Error: a job that can't see must say so, and never "no drift".
"""

from __future__ import annotations

from hafnium_contract.errors import InputError


class LogReadError(InputError):
    """A file of the inference log can't be read as one. The message names the file."""


class ReferenceSampleError(InputError):
    """reference.parquet lacks a column, or has no rows."""


class LabelError(InputError):
    """Labels can't be joined: no such file, or a column is missing."""


class StateError(InputError):
    """services.json, a route or an InferenceService file is not as agreed."""


class BusyError(InputError):
    """Another drift run holds the lock of this evidence folder; two would judge the same rows twice."""


class WrittenError(InputError):
    """Evidence is never changed: whoever runs the same window again finds it written."""


class UnwrittenError(InputError):
    """The evidence folder doesn't take the finding. The message has its verdict, so that it isn't lost."""


class PlaceError(InputError):
    """A bundle's storageUri can't be reached from here: no such volume, another scheme."""


class ApiServerError(InputError):
    """The API server refuses, or gave no answer after several tries."""


class ForbiddenError(ApiServerError):
    """401 or 403: the account, its role, or an admission policy."""


class ExistsError(ApiServerError):
    """409, reason AlreadyExists: the name is taken. Evidence is written once, so the finding is there already."""
