"""What the servers' log takes from KServe's SDK, and what it leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
from kserve.errors import InferenceError, InvalidInput, ModelNotFound

from hafnium_contract.serving.json_log import set_up


@pytest.fixture
def kserve() -> Iterator[logging.Logger]:
    """The SDK's logger; afterwards all logging is as it was."""
    loggers = [logging.getLogger(n) for n in (None, "kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access")]
    kept = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield logging.getLogger("kserve")
    for one, handlers, level, propagate in kept:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("error", [InvalidInput("4711"), InferenceError("4711"), ModelNotFound("4711"), NotImplementedError("4711")])
def test_what_a_gate_answers_and_logs_itself_is_not_logged_by_the_sdk(
    kserve: logging.Logger, capsys: pytest.CaptureFixture[str], form: Literal["json", "text"], error: Exception,
) -> None:
    set_up(form)
    kserve.error("Exception:", exc_info=error)
    assert capsys.readouterr().err == ""


def test_what_nobody_foresaw_in_the_sdk_is_logged(kserve: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up("json")
    kserve.error("Exception:", exc_info=RuntimeError("torn"))
    kserve.error("Error loading ASGI app")
    logging.getLogger("hafnium").error("ours", exc_info=NotImplementedError("torn"))
    logging.getLogger("hafnium").error("ours, too", exc_info=InferenceError("torn"))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [
        ("kserve", "Exception:"), ("kserve", "Error loading ASGI app"), ("hafnium", "ours"),
        ("hafnium", "ours, too")]
    assert "RuntimeError: torn" in lines[0]["error"]
