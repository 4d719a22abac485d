"""Rows that wait are held per rollout, and not for ever."""

from __future__ import annotations

import pytest
from hafnium_rollout_world import SERVICE, World, rollout

from hafnium_rollout import score_reading
from hafnium_rollout.observation import LiveRoute

MIRRORED = LiveRoute({"risk": 100}, frozenset({SERVICE}))
SCORES = {"name": "scores", "role": "Quality", "scores": {}, "compare": {"margin": 0.1}}
ERRORS = {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}}


def test_what_waits_is_kept_for_a_rollout_that_is_looked_at_and_forgotten_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_reading, "HELD_MAX", 3)
    world = World(rollout(gates=[ERRORS, SCORES], strategy={"steps": [{"shadow": True, "deadline": "1h"}, {"weight": 100}]}))
    world.turn()
    readers = score_reading.ScoreReaders()

    def reader(key: str) -> object:
        chosen = readers.choose(key, world.spec, world.status, MIRRORED)
        assert chosen is not None
        return chosen.reader

    first, gone = reader("first"), reader("gone")
    for other in ("a", "b", "c"):
        reader(other)
        assert reader("first") is first, "it is looked at"
    assert reader("gone") is not gone
