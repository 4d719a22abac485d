"""Errors of the monitoring jobs.

HafniumError
└── InputError               (hafnium_contract)
    ├── LogReadError         a file of the inference log is damaged, foreign, or lacks a column
    ├── ReferenceSampleError a bundle's reference.parquet does not hold what its contract promises
    ├── LabelError           the label file is missing, or lacks a column
    ├── StateError           the state folder of the local runtime can't be understood
    └── BusyError            another run holds the evidence folder

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
