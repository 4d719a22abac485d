"""Logs of the servers: one JSON object a line, with the request's id where there is one. Text for whoever reads along."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
_EXTRAS = ("request_id", "request_ids", "trace_id", "kind", "status")
_QUIET = ("kserve", "kserve.trace", "uvicorn.access")
"""Four lines per request of the SDK cost a fifth to a third of the throughput."""


class WithoutRefusals(logging.Filter):
    """Drops what KServe's SDK logs of requests that were refused: a traceback with the caller's values in its text, for each of them.

    The gates answer these errors, and log what is ours in them. What else goes wrong in the SDK is logged.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        error = record.exc_info[1] if record.exc_info else None
        # By its module's name: the log is set up before the SDK is imported, which takes seconds
        refused = type(error).__module__ == "kserve.errors" or isinstance(error, NotImplementedError)
        return not (refused and record.name.split(".")[0] == "kserve")


class JsonLines(logging.Formatter):
    """time, level, logger, message; what the caller gave of request_id (of a batch request_ids), trace_id, kind and status; the
    traceback as `error`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname,
            "logger": record.name, "message": record.getMessage(),
        }
        for name in _EXTRAS:
            value = getattr(record, name, None)
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(form: LogFormat) -> None:
    """Everything goes to standard error in this form, the SDK's lines too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(_TEXT))
    handler.addFilter(WithoutRefusals())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


class Sampled:
    """At most `lines_per_s` lines a second, so that an outage fills no disk. Says how many it kept back."""

    def __init__(self, logger: logging.Logger, lines_per_s: float) -> None:
        self._logger = logger
        self._pause_s = 1.0 / lines_per_s
        self._next = 0.0
        self._kept_back = 0

    def warning(self, now: float, message: str, **extra: object) -> None:
        """`now`: monotonic seconds."""
        if now < self._next:
            self._kept_back += 1
            return
        self._next = now + self._pause_s
        if self._kept_back:
            message += f" ({self._kept_back} more since the last line)"
            self._kept_back = 0
        self._logger.warning(message, extra=extra)
