"""The supervisor behind `hafnium up`: makes processes and gateway equal to the files in the state folder, again and again.

It is level-triggered: four times a second it reads what is wanted (`objects/`, `routes/`) and moves what is one step towards it.
It keeps nothing in memory that it could not find again, so it may be killed at any moment: its children die with it
(processes.py), and the next one starts from the files, on the same ports. Everything runs in one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.whole_files import write_atomically
from hafnium_local import envoy
from hafnium_local.instances import Instance, Service
from hafnium_local.manifests import INFERENCE_SERVICE, MODEL_ROLLOUT, Manifest, read_manifests, read_object, store
from hafnium_local.ports import Ports, is_free
from hafnium_local.probes import Probe
from hafnium_local.processes import Child, ProcessSpec, kill_leftovers, python_module
from hafnium_local.services import ServicePlan, plan_service, revision_of, taken_ports

HOST = envoy.HOST
PERIOD_S = 0.25
STOP_S = 20.0
"""After this a stop becomes a kill: more than the grace of any one process."""
REFUSED_S = 5.0
"""Between two tries to start what can't run here: its bundle may be on the way, or its port be freed."""
OWNER_LABEL = "hafnium.dev/rollout"
GATEWAY_KEY = "(gateway)"
FOLDERS = ("objects", "routes", "status", "actions", "evidence", "logs", "inference-log", "envoy")
OnEvent = Callable[[str], None]


def run(
    files: Sequence[Path], state: Path, port: int | None, on_event: OnEvent, *, look_seconds: float = 10.0,
    access_log: bool = False,
) -> int:
    """Runs until SIGINT or SIGTERM; returns the exit status. Blocks the main thread.

    `files` are applied to the state folder first (none: go on with what is there); `port` is the gateway's (None: the one of
    the last time, or any). `on_event` gets one line for people at a time. Raises a HafniumError with nothing changed and
    nothing running when the files, the folder or the port are not usable.
    """
    with _locked(state):
        return asyncio.run(_Supervisor(state, on_event, look_seconds, access_log).run(files, port))


@contextlib.contextmanager
def _locked(state: Path) -> Generator[None]:
    """One supervisor per state folder. The kernel drops the lock when its holder dies, however it dies."""
    try:
        for name in FOLDERS:
            (state / name).mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (state / "supervisor.lock").open("a", encoding="utf-8")
    except OSError as e:
        raise InputError(f"{state}: can't be used as a state folder: {e.strerror}") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            pid = _read_json(state / "runtime.json").get("pid")
            raise InputError(
                f"{state}: is in use by another `hafnium up`{f' (process {pid})' if pid else ''}; "
                "stop that one or use another --state"
            ) from e
        yield


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


@dataclass
class _Cached:
    """A parsed file, and the inode, size and time by which a change is seen."""

    stamp: tuple[int, int, int]
    value: Any


class _Folder:
    """The files of a folder, parsed again only when they changed. What can't be parsed is told once and keeps its last value."""

    def __init__(self, folder: Path, pattern: str, parse: Callable[[Path], Any], on_event: OnEvent) -> None:
        self._folder, self._pattern, self._parse, self._on_event = folder, pattern, parse, on_event
        self._cache: dict[str, _Cached] = {}

    def read(self) -> dict[str, Any]:
        """File name → value."""
        found: dict[str, _Cached] = {}
        for file in sorted(self._folder.glob(self._pattern)):
            before = self._cache.get(file.name)
            stamp = (0, 0, 0)
            try:
                s = file.stat()
                stamp = (s.st_ino, s.st_size, s.st_mtime_ns)
                if before is not None and before.stamp == stamp:
                    found[file.name] = before
                    continue
                found[file.name] = _Cached(stamp, self._parse(file))
            except FileNotFoundError:
                continue  # removed between the listing and the look
            except (HafniumError, OSError, ValueError) as e:
                self._on_event(f"{file}: not taken over: {e}")
                found[file.name] = _Cached(stamp, before.value if before else None)
        self._cache = found
        return {name: c.value for name, c in found.items() if c.value is not None}


def _parse_route(file: Path) -> envoy.Route:
    route = envoy.parse_route(json.loads(file.read_text(encoding="utf-8")), str(file))
    if route.name != file.stem:
        raise InputError(f"{file}: name is {route.name!r}, expected {file.stem!r} as the file's")
    return route


class _Supervisor:
    def __init__(self, state: Path, on_event: OnEvent, look_seconds: float, access_log: bool) -> None:
        self.state = state.resolve()
        self._on_event = on_event
        self._look_seconds = look_seconds
        self._access_log = access_log
        self._ports = Ports(self.state / "ports.json")
        self._services: dict[str, Service] = {}
        self._objects = _Folder(self.state / "objects", "*.yaml", read_object, on_event)
        self._routes = _Folder(self.state / "routes", "*.json", _parse_route, on_event)
        self._files = envoy.EnvoyFiles(self.state / "envoy")
        self._runtime: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        self._gateway: Child | None = None
        self._rollout: Child | None = None
        self._tasks: dict[Child, asyncio.Task[None]] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._told: dict[str, tuple[bool, int, str]] = {}
        self._told_gateway: tuple[bool, int] = (False, 0)
        self._told_rollout = 0
        self._cluster_left_at: float | None = None
        self._rendered: Any = None
        self._failed_write = ""
        self._stop = asyncio.Event()
        self._signals = 0

    async def run(self, files: Sequence[Path], port: int | None) -> int:
        left = kill_leftovers(self.state)
        self._mark_down("the supervisor is starting")  # a killed one's last words must not be taken for the truth
        if left:
            self._on_event(f"ended {len(left)} process{'es' if len(left) != 1 else ''} that the last run had left behind")
        self._choose_ports(port)  # before any service gets one, or a new service could take the gateway's
        self._apply(files)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            self._start_gateway()
            while not self._stop.is_set():
                self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PERIOD_S):
                        await self._stop.wait()
            self._on_event("stopping")
            await self._end()
        finally:
            self._kill()
            # cancelled tasks must run their endings before the loop closes
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            with contextlib.suppress(OSError):
                write_atomically(self.state / "runtime.json", json.dumps({**self._runtime, "pid": None}, indent=1))
                self._mark_down("the supervisor is not running")
        self._on_event("stopped")
        return 0

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._kill()

    def _mark_down(self, message: str) -> None:
        """No service of services.json is ready, because of `message`."""
        entries: Any = _read_json(self.state / "services.json").get("services")
        if isinstance(entries, list):
            down = [{**e, "ready": False, "message": message} for e in cast(list[Any], entries) if isinstance(e, dict)]
            self._write("services.json", {"services": down})

    def _apply(self, files: Sequence[Path]) -> None:
        if not files:
            if not any((self.state / "objects").glob("*.yaml")):
                raise InputError(f"{self.state}: nothing to run: give a file with an InferenceService")
            return
        found = read_manifests(files)
        for line in found.ignored:
            self._on_event(line)
        services = [m for m in found.objects if m.kind == INFERENCE_SERVICE]
        for m in services:
            plan_service(m, self._ports, self.state)  # a model that can't run here is an error now, not a line in a log later
        changed = store(found.objects, self.state / "objects")
        count = len(found.objects)
        self._on_event(f"applied {count} object{'s' if count != 1 else ''}, {len(changed)} new or changed")

    def _choose_ports(self, port: int | None) -> None:
        """The gateway's ports: the wanted one, or those of the last time when they are free, or others."""
        before = _read_json(self.state / "runtime.json")
        if port is not None and not is_free(port):
            raise InputError(f"port {port} is taken by another program; use another --port")
        ports: dict[str, int] = {}
        for key, wanted in (("gateway", port or before.get("gatewayPort")), ("admin", before.get("adminPort"))):
            ports[key] = self._ports.claim(f"{GATEWAY_KEY}/{key}", wanted if isinstance(wanted, int) else None)
        self._runtime = {
            "pid": os.getpid(), "gatewayPort": ports["gateway"], "adminPort": ports["admin"],
            "startedAt": datetime.now(UTC).isoformat(timespec="seconds"), "defaultRoute": before.get("defaultRoute"),
        }

    def _start_gateway(self) -> None:
        try:
            self._files.start(envoy.bootstrap(
                self.state / "envoy", gateway_port=self._runtime["gatewayPort"], admin_port=self._runtime["adminPort"],
                access_log=self.state / "logs" / "envoy-access.log" if self._access_log else None,
            ))
            self._write("runtime.json", self._runtime)
        except OSError as e:
            raise InputError(f"{self.state}: can't be written: {e.strerror}") from e
        spec = ProcessSpec(
            "envoy", envoy.command(self.state / "envoy"), probe=Probe(HOST, self._runtime["adminPort"], "/ready", period_s=0.5),
            grace_s=5.0,
        )
        self._gateway = self._supervise(spec)

    def _supervise(self, spec: ProcessSpec) -> Child:
        child = Child(spec, self.state / "logs" / f"{spec.name}.log", self.state, lambda _: None)
        self._tasks[child] = asyncio.create_task(child.run(), name=spec.name)
        return child

    def _tick(self) -> None:
        """One look and one step. A full disk stops nothing that runs: it is told once, and tried again at the next look."""
        try:
            self._step(time.monotonic())
            self._failed_write = ""
        except OSError as e:
            text = f"{self.state}: can't be written or read: {e.strerror or e}; trying again"
            if text != self._failed_write:
                self._on_event(text)
                self._failed_write = text

    def _step(self, now: float) -> None:
        objects: list[Manifest] = list(self._objects.read().values())
        wanted = {m.name: m for m in objects if m.kind == INFERENCE_SERVICE}
        rollouts = {m.name for m in objects if m.kind == MODEL_ROLLOUT}
        for name, manifest in wanted.items():
            self._aim(self._services.setdefault(name, Service(name, self._start_instance)), manifest, now)
        for name, service in list(self._services.items()):
            if name not in wanted:
                service.aim(None)
            service.step(now)
            if name not in wanted and service.ended:
                del self._services[name]
                self._refused.pop(name, None)
        self._own_routes(wanted, rollouts)  # first: a rollout learns from the route which service is the stable one
        self._follow_rollouts(rollouts)
        self._render(now, self._routes.read())
        self._save(wanted)
        self._tell()
        for task in self._tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def _start_instance(self, plan: ServicePlan) -> Instance:
        return Instance(plan, self.state)

    def _aim(self, service: Service, manifest: Manifest, now: float) -> None:
        revision = revision_of(manifest)
        if service.wanted_revision == revision:
            service.error = ""
            lost = service.active.lost_port if service.active is not None else None
            if lost is not None and (plan := self._plan(manifest)) is not None:
                self._on_event(f"{service.name}: port {lost} was taken by another program; moving to other ports")
                service.restart(plan, now)
            return
        refused, at = self._refused.get(service.name, ("", 0.0))
        if refused == revision and now - at < REFUSED_S:
            return
        plan = self._plan(manifest)
        if plan is None:
            self._refused[service.name] = (revision, now)
            return
        self._refused.pop(service.name, None)
        service.error = ""
        service.aim(plan)

    def _plan(self, manifest: Manifest) -> ServicePlan | None:
        """The plan on ports that are free; None, with the reason in the service's entry, when it can't run here."""
        service = self._services[manifest.name]
        mine = {p for i in service.instances for p in i.ports}
        try:
            plan = plan_service(manifest, self._ports, self.state)
            lost = service.active.lost_port if service.active is not None else None
            taken = [p for p in taken_ports(plan) if p not in mine or p == lost]
            declared = [p for p in taken if p not in {self._ports.get(key) for key in plan.port_keys}]
            if declared:  # nothing to move to: its process goes on trying
                raise InputError(
                    f"port {declared[0]}, which its container declares, is taken by another program or service; "
                    "end that one or declare another containerPort"
                )
            if taken:
                for key in plan.port_keys:
                    self._ports.renew(key)
                plan = plan_service(manifest, self._ports, self.state)
        except HafniumError as e:
            service.error = str(e)
            return None
        return plan

    def _follow_rollouts(self, rollouts: set[str]) -> None:
        """The rollout controller runs while there is a ModelRollout."""
        if rollouts and self._rollout is None:
            arguments = ("--state", str(self.state), "--look-seconds", f"{self._look_seconds:g}")
            self._rollout = self._supervise(ProcessSpec("rollout", python_module("hafnium_rollout", *arguments), grace_s=5.0))
        elif not rollouts and self._rollout is not None:
            self._rollout.stop()
            if self._tasks[self._rollout].done():
                del self._tasks[self._rollout]
                self._rollout = None

    def _own_routes(self, wanted: dict[str, Manifest], rollouts: set[str]) -> None:
        """A route for each service that no rollout looks after; the rollout controller writes all others."""
        folder = self.state / "routes"
        routes: dict[str, envoy.Route] = {r.name: r for r in self._routes.read().values()}
        used = {n for r in routes.values() for n in (r.stable, r.candidate)}
        for name, manifest in wanted.items():
            if name in routes or name in used or (folder / f"{name}.json").exists() or _is_owned(manifest):
                continue
            route = {"name": name, "stable": name, "candidate": None, "weight": 0, "shadow": False}
            write_atomically(folder / f"{name}.json", json.dumps(route, indent=1))
        for name, route in routes.items():
            mine = route.stable == name and route.candidate is None and name not in rollouts
            if mine and name not in wanted:
                (folder / f"{name}.json").unlink(missing_ok=True)

    def _render(self, now: float, found: dict[str, Any]) -> None:
        routes: list[envoy.Route] = list(found.values())
        names = sorted(r.name for r in routes)
        default = self._runtime.get("defaultRoute")
        if default not in names:
            default = names[0] if names else None
            self._runtime["defaultRoute"] = default
        endpoints = {n: e for n, s in self._services.items() if (e := s.endpoint) is not None}
        waited = self._cluster_left_at is not None and now - self._cluster_left_at > 1.0
        if (endpoints, routes, default) != self._rendered or waited:
            leaving = self._files.update(endpoints, routes, default)
            self._cluster_left_at = now if leaving else None
            self._rendered = (endpoints, routes, default)

    def _save(self, wanted: dict[str, Manifest]) -> None:
        kept = {k for s in self._services.values() for i in s.instances for k in i.plan.port_keys}
        self._ports.keep_only(kept | {f"{GATEWAY_KEY}/gateway", f"{GATEWAY_KEY}/admin"})
        self._ports.save()
        states = [s.state for n, s in sorted(self._services.items()) if n in wanted]
        self._write("services.json", {"services": [s.as_json() for s in states]})
        self._write("runtime.json", self._runtime)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        text = json.dumps(data, indent=1)
        if self._written.get(name) != text:
            write_atomically(self.state / name, text)
            self._written[name] = text

    def _tell(self) -> None:
        """One line when something that people care about changed."""
        gateway = self._gateway
        if gateway is not None:
            now = (gateway.state.ready, gateway.state.restarts)
            if now[1] > self._told_gateway[1]:
                self._on_event(f"gateway: {gateway.state.last_exit}; it starts again on the same port")
            if now[0] and now != self._told_gateway:
                self._on_event(f"gateway: http://{HOST}:{self._runtime['gatewayPort']}")
            if now[0] or now[1] > self._told_gateway[1]:
                self._told_gateway = now
        if self._rollout is not None and self._rollout.state.restarts > self._told_rollout:
            self._told_rollout = self._rollout.state.restarts
            self._on_event(f"rollout controller: {self._rollout.state.last_exit}; it starts again")
        for name, service in self._services.items():
            state = service.state
            before = self._told.get(name, (False, 0, ""))
            if state.restarts > before[1] and service.active is not None:
                self._on_event(f"{name}: {service.active.last_exit} (restart {state.restarts})")
            if state.ready != before[0]:
                version = f", model version {state.model_version}" if state.model_version else ""
                self._on_event(f"{name}: ready{version}" if state.ready else f"{name}: not ready: {state.message}")
            elif service.error and service.error != before[2]:
                self._on_event(f"{name}: {service.error}")
            self._told[name] = (state.ready, state.restarts, service.error)
        self._told = {n: t for n, t in self._told.items() if n in self._services}

    async def _end(self) -> None:
        """Everything down in order: nobody moves traffic, nobody sends it, nobody serves it."""
        for child in (self._rollout, self._gateway):
            if child is not None:
                child.stop()
                await self._within(self._tasks[child])
        instances = [i for s in self._services.values() for i in s.instances]
        for instance in instances:
            instance.stop()
        for instance in instances:
            await self._within(asyncio.ensure_future(instance.wait()))

    async def _within(self, task: asyncio.Future[Any]) -> None:
        await asyncio.wait({task}, timeout=STOP_S)

    def _kill(self) -> None:
        """SIGKILL to all that is left."""
        for child, task in self._tasks.items():
            task.cancel()
            child.kill()
        for service in self._services.values():
            for instance in service.instances:
                instance.kill()


def _is_owned(manifest: Manifest) -> bool:
    """Whether a rollout made this service and routes to it."""
    if OWNER_LABEL in manifest.labels:
        return True
    owners: Any = manifest.data["metadata"].get("ownerReferences") or []
    return any(o.get("kind") == MODEL_ROLLOUT for o in owners)
