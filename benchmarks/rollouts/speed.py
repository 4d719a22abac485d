"""How long one decision takes with 50 gates: CPU time of the deciding thread, so that other work on the machine counts for less."""

from __future__ import annotations

import time
from dataclasses import replace

import climb
import worlds

from hafnium_rollout.actions import Decision
from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.objects import GATES_MAX, ModelRollout
from hafnium_rollout.observation import Observation

WARM = 30


def crowded(rollout: ModelRollout) -> ModelRollout:
    """The sample with as many gates as are allowed, in the same proportions."""
    given = rollout.spec.gates
    gates = tuple(
        Gate.model_validate({**given[i % len(given)].model_dump(exclude_none=True), "name": f"{given[i % len(given)].name}-{i}"})
        for i in range(GATES_MAX)
    )
    return rollout.model_copy(update={"spec": rollout.spec.model_copy(update={"gates": gates})})


class Timed(climb.Climb):
    """A climb with 50 gates that notes how long each decision took."""

    def __init__(self) -> None:
        super().__init__("constant", (1,), worlds.Harm(), (climb.Phi(1.2, 1.0), climb.Phi(1.2, 1.0)))
        self.rollout = crowded(self.rollout)
        self.live_ms: list[float] = []

    def decided(self, seen: Observation) -> Decision:
        if seen.look is not None:  # the sample's looks serve all gates of their kind
            gates = {g.name: seen.look.gates[k] for g in self.rollout.spec.gates if (k := g.name.split("-")[0]) in seen.look.gates}
            seen = replace(seen, look=replace(seen.look, gates=gates))
        step = self.status.step
        began = time.thread_time()
        decision = super().decided(seen)
        if step is not None and 0 < (step.weight_observed or 0) < 100:
            self.live_ms.append(1e3 * (time.thread_time() - began))
        return decision


def decide_ms() -> list[float]:
    """Milliseconds of each decision while both arms get live traffic, with φ and restarts."""
    rollout = Timed()
    rollout.run()
    return rollout.live_ms[WARM:]
