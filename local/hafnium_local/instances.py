"""A service over time: the revision that answers, the one that is coming up, and those that are on their way out.

A changed InferenceService is replaced as a Deployment would: the new revision starts beside the old one on ports of its own, takes
over when it is ready, and the old one ends after the gateway has left it. One that never gets ready changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hafnium_local.envoy import Endpoint
from hafnium_local.ports import is_free
from hafnium_local.processes import Child
from hafnium_local.services import HOST, ServicePlan

DRAIN_S = 2.0
"""Between the gateway being told and the old processes being told: Envoy takes a renamed file over within milliseconds."""


@dataclass(frozen=True)
class ServiceState:
    """An entry of services.json."""

    name: str
    model_name: str = ""
    model_version: str = ""
    model_digest: str = ""
    ready: bool = False
    restarts: int = 0
    message: str = ""
    port: int | None = None
    predictor_port: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "modelName": self.model_name, "modelVersion": self.model_version, "modelDigest": self.model_digest,
            "ready": self.ready, "restarts": self.restarts, "message": self.message, "host": HOST, "port": self.port,
            "predictorPort": self.predictor_port,
        }


class Instance:
    """The processes of one revision, started when the object is made (inside a running event loop, in the main thread)."""

    def __init__(self, plan: ServicePlan, state_folder: Path) -> None:
        self.plan = plan
        logs = state_folder / "logs"
        self.children = [Child(spec, logs / f"{spec.name}.log", state_folder, _unheard) for spec in plan.processes]
        self._tasks = [asyncio.create_task(c.run(), name=c.spec.name) for c in self.children]

    @property
    def ready(self) -> bool:
        return all(c.state.ready for c in self.children)

    @property
    def restarts(self) -> int:
        return sum(c.state.restarts for c in self.children)

    @property
    def message(self) -> str:
        """Empty when ready; else what keeps it from being so, of the first process that isn't ready."""
        return next((f"{c.spec.name}: {c.state.message}" for c in self.children if not c.state.ready), "")

    @property
    def last_exit(self) -> str:
        return next((f"{c.spec.name}: {c.state.last_exit}" for c in self.children if c.state.last_exit), "")

    @property
    def ended(self) -> bool:
        return all(t.done() for t in self._tasks)

    @property
    def ports(self) -> set[int]:
        return {p.probe.port for p in self.plan.processes if p.probe is not None}

    @property
    def lost_port(self) -> int | None:
        """A port that another program took while its process was down; None when there is none."""
        for child in self.children:
            probe = child.spec.probe
            if child.state.pid is None and child.state.restarts >= 2 and probe is not None and not is_free(probe.port):
                return probe.port
        return None

    def stop(self) -> None:
        """Tells all processes to end, the front one first in effect: the gateway left it already."""
        for child in self.children:
            child.stop()

    async def wait(self) -> None:
        """Until all processes are gone. An error of the supervision itself is raised here."""
        await asyncio.gather(*self._tasks)

    def check(self) -> None:
        """Raises what a task died of: that is a bug in the supervision, and silence would hide an unwatched process."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def kill(self) -> None:
        for task, child in zip(self._tasks, self.children, strict=True):
            task.cancel()
            child.kill()


def _unheard(_: Child) -> None:
    """The supervisor looks four times a second; nobody waits for the single change."""


class Service:
    """One InferenceService, by name. `aim` says what is wanted; `step` moves towards it."""

    def __init__(self, name: str, start: Callable[[ServicePlan], Instance]) -> None:
        self.name = name
        self.active: Instance | None = None
        self.pending: Instance | None = None
        self.error = ""
        """Why the wanted object can't run; what ran before goes on."""
        self._start = start
        self._wanted: ServicePlan | None = None
        self._moved: tuple[str, int] = ("", 0)
        """A revision that moved to other ports, and its restarts until then."""
        self._leaving: list[tuple[float, Instance]] = []

    @property
    def wanted_revision(self) -> str | None:
        return self._wanted.revision if self._wanted is not None else None

    @property
    def ended(self) -> bool:
        return self._wanted is None and self.active is None and self.pending is None and not self._leaving

    def aim(self, plan: ServicePlan | None) -> None:
        """What should run; None: nothing."""
        self._wanted = plan

    def restart(self, plan: ServicePlan, now: float) -> None:
        """The same revision on other ports."""
        self._wanted = plan
        if self.active is not None:
            self._moved = (self.active.plan.revision, self._restarts(self.active))
        for instance in (self.active, self.pending):
            if instance is not None:
                self._retire(instance, now)
        self.active = self.pending = None

    def step(self, now: float) -> None:
        """One move towards the aim; `now` is a monotonic clock in seconds."""
        for at, instance in self._leaving:
            if now >= at:
                instance.stop()
        self._leaving = [(at, i) for at, i in self._leaving if not i.ended]
        for instance in (self.active, self.pending, *(i for _, i in self._leaving)):
            if instance is not None:
                instance.check()
        plan = self._wanted
        if plan is None:
            for instance in (self.active, self.pending):
                if instance is not None:
                    self._retire(instance, now + DRAIN_S)
            self.active = self.pending = None
            return
        if self.active is not None and self.active.plan.revision == plan.revision:
            self._drop_pending(now)
            return
        if self.pending is not None and self.pending.plan.revision != plan.revision:
            self._drop_pending(now)
        self._replace(plan, now)

    def _replace(self, plan: ServicePlan, now: float) -> None:
        needed = {p.probe.port for p in plan.processes if p.probe is not None}
        if self.active is not None and self.active.ports & needed:
            # a container that insists on its port can't run twice, so this one has a gap, as strategy Recreate has
            self._retire(self.active, now)
            self.active = None
        if any(i.ports & needed for _, i in self._leaving):
            return
        if self.active is None and self.pending is None:
            self.active = self._start(plan)
        elif self.pending is None:
            self.pending = self._start(plan)
        elif self.pending.ready or self.active is None:
            if self.active is not None:
                self._retire(self.active, now + DRAIN_S)
            self.active, self.pending = self.pending, None

    def _drop_pending(self, now: float) -> None:
        if self.pending is not None:
            self._retire(self.pending, now)
            self.pending = None

    def _retire(self, instance: Instance, at: float) -> None:
        self._leaving.append((at, instance))

    def _restarts(self, instance: Instance) -> int:
        revision, before = self._moved
        return instance.restarts + (before if instance.plan.revision == revision else 0)

    @property
    def instances(self) -> list[Instance]:
        return [i for i in (self.active, self.pending, *(i for _, i in self._leaving)) if i is not None]

    @property
    def endpoint(self) -> Endpoint | None:
        return None if self.active is None else Endpoint(self.name, self.active.plan.port, self.active.plan.health_path)

    @property
    def state(self) -> ServiceState:
        instance = self.active
        parts = [self.error] if self.error else []
        if instance is None:
            return ServiceState(self.name, message=self.error or "is being replaced")
        if instance.message:
            parts.append(instance.message)
        if self.pending is not None:
            parts.append(f"a new revision is coming up: {self.pending.message or 'ready'}")
        plan = instance.plan
        base = ServiceState(
            self.name, plan.model_name, plan.model_version, plan.model_digest, port=plan.port, predictor_port=plan.predictor_port
        )
        return replace(base, ready=instance.ready, restarts=self._restarts(instance), message="; ".join(parts))
