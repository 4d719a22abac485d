"""Watches live as long as their process: whatever the API server does, they come back and say what was wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from hafnium_scripted_api import Answer, Asked, says, scripted_api

from hafnium_rollout.kubernetes import watches
from hafnium_rollout.kubernetes.client import Limits
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL
from hafnium_rollout.kubernetes.watches import WATCHED, Watches

EVENT = {"type": "ADDED", "object": {"metadata": {"namespace": "risk", "name": "a", "resourceVersion": "8"}}}


class Heard:
    """Calls and sayings of watches, and a way to wait for them."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.called: list[Any] = []
        self.said: list[tuple[str, str, str]] = []

    def say(self, level: str, event: str, message: str) -> None:
        self.said.append((level, event, message))

    def names(self) -> list[str]:
        return [event for _, event, _ in self.said]


def _until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.01)


def _working(asked: Asked) -> Answer:
    """No connection outlives its answer: one that stays open is answered by a server that is shut down, too."""
    found = json.dumps(EVENT if "watch=1" in asked.path else {"metadata": {"resourceVersion": "7"}, "items": []})
    return Answer(200, found.encode() + b"\n", {"Connection": "close"})


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    monkeypatch.setattr(watches, "_PAUSE_FIRST_S", 0.01)
    monkeypatch.setattr(watches, "_PAUSE_MAX_S", 0.02)
    monkeypatch.setattr(watches, "_ABSENT_PAUSE_S", 0.01)
    return Heard()


def test_watches_come_back_after_an_api_server_that_was_away(heard: Heard) -> None:
    with scripted_api(_working) as api:
        port = urlsplit(api.url).port or 0
        Watches(api.client(limits=Limits(attempts_max=1)), "", heard.called.append, heard.stop, heard.say).start()
        _until(lambda: len(heard.called) >= len(WATCHED))
    try:
        _until(lambda: heard.names().count("WatchFailed") == len(WATCHED))
        assert {t.name for t in threading.enumerate()} >= {f"watch-{k.plural}" for k in WATCHED}
        heard.called.clear()
        with scripted_api(_working, port=port):
            _until(lambda: heard.names().count("WatchBack") == len(WATCHED) and len(heard.called) >= len(WATCHED))
            heard.stop.set()
    finally:
        heard.stop.set()


@pytest.mark.parametrize("fault", [
    Answer(cut=True), says(503, "starting"), says(410, "too old"), says(404, "no such kind"), Answer(200, b"<html>"), Answer(200, b"[]\n"),
    Answer(200, b'{"type": "ADDED", "object": {"metadata": 5}}\n'),
], ids=["cut", "busy", "too old", "absent", "no JSON", "no object", "an object without metadata"])
def test_a_watch_survives_whatever_it_is_answered(heard: Heard, fault: Answer) -> None:
    faults = 3

    def answer(asked: Asked) -> Answer:
        nonlocal faults
        if "watch=1" in asked.path and faults:
            faults -= 1
            return fault
        return _working(asked)

    def call(key: Any) -> None:
        heard.called.append(key)
        heard.stop.set()

    with scripted_api(answer) as api:
        Watches(api.client(), "", call, heard.stop, heard.say)._run(MODEL_APPROVAL)
    assert heard.called == [("risk", "*")]
    assert heard.names() in (["WatchFailed", "WatchBack"], []), "said once, however often it fails"
