"""Which scores of a rollout are compared now, and the rows that wait for it: pairs while the candidate gets copies, scores across the arms
while both answer. The same on one machine and on a cluster; where the logs are is the caller's."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import LiveRoute
from hafnium_rollout.score_pairs import ScorePairs, ScoresAcross
from hafnium_rollout.status import RolloutStatus

HELD_MAX = 2000
"""Rollouts whose rows are held. Beyond it the one that was looked at longest ago is forgotten, as by a restart: it may be gone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read with, and from where on."""

    reader: ScorePairs | ScoresAcross
    cursor: Mapping[str, Any]
    """Empty: what is there now came before."""


class ScoreReaders:
    """Waiting rows per rollout. Safe between threads as long as one rollout is looked at by one of them."""

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[str, ScorePairs | ScoresAcross]] = {}
        self._lock = threading.Lock()

    def choose(self, key: Hashable, rollout: ModelRollout, status: RolloutStatus, live: LiveRoute | None) -> Reading | None:
        """What to read for the rollout `key` in this look; None when no scores can be compared."""
        candidate = status.candidate
        gates = [g.scores for g in rollout.spec.gates if g.scores is not None]
        if candidate is None or live is None or not gates:
            return None
        weight = live.weights.get(candidate.service, 0)
        if candidate.service in live.mirrors:
            across, name = False, status.run_id
        elif any(g.unpaired for g in gates) and 0 < weight < 100:
            # Scores from another weight are another mixture of times.
            across, name = True, f"{status.run_id} {weight}"
        else:
            return None
        with self._lock:
            held = self._held.pop(key, None)
            same = held is not None and held[0] == name
            reader = held[1] if held is not None and same else _reader(across, status)
            self._held[key] = (name, reader)
            if len(self._held) > HELD_MAX:
                del self._held[next(iter(self._held))]
        known = status.cursor.get("log")
        cursor = cast("Mapping[str, Any]", known) if isinstance(known, dict) else {}
        if bool(cursor.get("live")) != across or (across and not reader.knows(cursor)):
            cursor = {}  # the other kind of step, or rows that are lost (a restart, another leader): what lies there came before
        return Reading(reader, cursor)

    def give_back(self, key: Hashable, differences: tuple[float, ...]) -> None:
        """These met no look: they come again with the next one."""
        with self._lock:
            held = self._held.get(key)
        if held is not None:
            held[1].give_back(differences)


def _reader(across: bool, status: RolloutStatus) -> ScorePairs | ScoresAcross:
    return ScoresAcross(status.stable.digest if status.stable is not None else "") if across else ScorePairs()
