"""The loop: observe → decide → write the status → act. Level-triggered: each turn starts from the files, nothing is remembered.

One controller acts per state folder (flock, released by the kernel however the holder dies); a second one waits its turn.
"""

from __future__ import annotations

import fcntl
import json
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from hafnium_contract.errors import HafniumError
from hafnium_contract.whole_files import write_atomically
from hafnium_rollout.actions import Decision
from hafnium_rollout.companions import Companions
from hafnium_rollout.controller_settings import ControllerSettings
from hafnium_rollout.decide import decide
from hafnium_rollout.errors import StateError
from hafnium_rollout.local_backend import LocalBackend
from hafnium_rollout.notifications.cursors import FileCursors
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.notifications.notifier import Notifier
from hafnium_rollout.objects import ModelRollout, load_rollout
from hafnium_rollout.retraining.trigger import CommandStarter, FileAttempts, RetrainingTrigger
from hafnium_rollout.state_folder import StateFolder
from hafnium_rollout.status import RolloutStatus

Log = Callable[[dict[str, Any]], None]


def print_json(line: dict[str, Any]) -> None:
    """One JSON object per line on standard output."""
    sys.stdout.write(json.dumps(line, ensure_ascii=False, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> str:
    return value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else str(value)


class Controller:
    """All rollouts of one state folder. `now` and `log` are seams for tests."""

    def __init__(
        self, state: StateFolder, *, now: Callable[[], datetime] = lambda: datetime.now(UTC), log: Log = print_json,
        companions: Companions | None = None,
    ) -> None:
        self._state = state
        self._companions = companions or Companions(log, lambda s: state.record(s.name))
        self._backend = LocalBackend(state)
        self._now = now
        self._log = log
        self._good: dict[str, ModelRollout] = {}
        """Last readable object per rollout, which is on disk too (`StateFolder.last_good`)."""
        self._said: dict[str, str] = {}
        self._written: dict[str, tuple[bytes, RolloutStatus]] = {}

    def turn(self) -> float | None:
        """One turn for every rollout. Returns how soon the next is wanted (s), None for the regular time."""
        soon: list[float] = []
        names = self._state.rollout_names()
        for name in names:
            try:
                decision = self._one(name)
            except Exception as e:  # noqa: BLE001 - one rollout's trouble must not stop the guard over the others
                self._once(name, f"error:{e}", {"level": "error", "rollout": name, "event": "TurnFailed", "message": str(e),
                                                **({} if isinstance(e, HafniumError | OSError) else {"trace": traceback.format_exc()})})
                continue
            if decision is not None and decision.requeue_s is not None:
                soon.append(decision.requeue_s)
        for name in {*self._state.status_names(), *self._state.last_good_names()} - set(names):
            try:
                self._deleted(name)
            except (HafniumError, OSError) as e:
                self._once(name, f"error:{e}", {"level": "error", "rollout": name, "event": "TurnFailed", "message": str(e)})
        return min(soon, default=None)

    def _one(self, name: str) -> Decision | None:
        rollout = self._rollout(name)
        if rollout is None:
            return None
        status = self._read_status(name)
        now = self._now()
        seen = self._backend.observe(rollout, status, now)
        decision = decide(rollout, status, seen, now)
        if decision.status != status:
            self._write_status(name, decision.status)
        self._tell(name, decision, seen.problems, now)
        try:
            for action in decision.actions:
                self._log({"time": now, "level": "info", "rollout": name, "event": "Action", "action": type(action).__name__,
                           "detail": _detail(action)})
                self._backend.apply(rollout, action)
            self._backend.forget_actions(name, decision.status.handled_actions)
        finally:
            self._companions.decided(rollout, status, seen, now, decision)
            self._companions.turned(rollout, decision.status, seen, now)
        return decision

    def _rollout(self, name: str) -> ModelRollout | None:
        path = self._state.rollout(name)
        try:
            rollout = load_rollout(path)
            if rollout.name != name:
                raise StateError(f"{path}: metadata.name is {rollout.name!r}, the file name says {name!r}")
            old = self._last_good(name)
            if old is not None and old.spec.model.name != rollout.spec.model.name:
                raise StateError(f"{path}: spec.model.name can't change ({old.spec.model.name} → {rollout.spec.model.name})")
        except HafniumError as e:
            kept = self._last_good(name)
            more = "; going on with the last good one" if kept is not None else ""
            self._once(f"{name}/spec", str(e), {"level": "error", "rollout": name, "event": "SpecInvalid", "message": f"{e}{more}"})
            return kept
        if old != rollout:
            data = rollout.model_dump(mode="json", by_alias=True, exclude_none=True)
            write_atomically(self._state.last_good(name), json.dumps(data, indent=1))  # JSON is YAML
        self._good[name] = rollout
        self._said.pop(f"{name}/spec", None)
        return rollout

    def _last_good(self, name: str) -> ModelRollout | None:
        path = self._state.last_good(name)
        if name not in self._good and path.is_file():
            try:
                self._good[name] = load_rollout(path)
            except HafniumError as e:  # of an older version, perhaps
                path.unlink()
                self._log({"time": self._now(), "level": "warning", "rollout": name, "event": "LastGoodInvalid", "message": str(e)})
        return self._good.get(name)

    def _read_status(self, name: str) -> RolloutStatus:
        path = self._state.status(name)
        try:
            text = path.read_bytes()
            known = self._written.get(name)
            # The file is the truth; parsing it anew is only skipped when it still holds what was written last.
            return known[1] if known is not None and known[0] == text else RolloutStatus.model_validate_json(text)
        except FileNotFoundError:
            return RolloutStatus()
        except (OSError, ValidationError) as e:
            raise StateError(f"{path}: can't be read, so nothing is moved; repair it or move it away: {e}") from e

    def _write_status(self, name: str, status: RolloutStatus) -> None:
        text = status.model_dump_json()
        write_atomically(self._state.status(name), text)
        self._written[name] = (text.encode(), status)

    def _deleted(self, name: str) -> None:
        """The ModelRollout was deleted. Under way, the candidate goes back to nothing: nobody watches it any more."""
        status = self._read_status(name)
        known = self._last_good(name)
        self._good.pop(name, None)
        self._state.last_good(name).unlink(missing_ok=True)
        if status.phase not in ("Promoted", "RolledBack") and status.stable is not None and status.candidate is not None:
            self._backend.stable_only(name, status.stable.service)
            self._log({"time": self._now(), "level": "warning", "rollout": name, "event": "Deleted",
                       "message": f"the ModelRollout was deleted under way; {status.stable.service} answers all requests"})
        for service in self._backend.managed(name):
            if status.stable is None or service != status.stable.service:
                self._state.service(service).unlink(missing_ok=True)
        self._state.status(name).unlink(missing_ok=True)
        self._companions.gone(Subject(known.metadata.namespace if known is not None else "default", name))

    def _tell(self, name: str, decision: Decision, problems: tuple[str, ...], now: datetime) -> None:
        status = decision.status
        for event in decision.events:
            self._log({
                "time": now, "level": "warning" if event.alert else "info", "rollout": name, "event": event.name,
                "reason": event.reason, "message": event.message, "phase": status.phase,
                "weight": status.step.weight_desired if status.step else None, "alert": event.alert,
            })
        text = "; ".join(problems)
        if text:
            self._once(f"{name}/problems", text, {"level": "warning", "rollout": name, "event": "Unreadable", "message": text})
        else:
            self._said.pop(f"{name}/problems", None)
        self._said.pop(name, None)

    def _once(self, key: str, text: str, line: dict[str, Any]) -> None:
        """The same complaint is made once, not at every look."""
        if self._said.get(key) != text:
            self._said[key] = text
            self._log({"time": self._now(), **line})


def _detail(action: object) -> dict[str, Any]:
    names = getattr(action, "__slots__", ())
    return {n: getattr(action, n) for n in names if n not in ("template", "model")}


@contextmanager
def only_one(state: StateFolder, stop: threading.Event, log: Log, *, poll_s: float = 1.0) -> Generator[bool]:
    """Holds the folder's lock, waiting for it until `stop` is set. Yields whether it is held."""
    state.root.mkdir(parents=True, exist_ok=True)
    waited = False
    with state.lock.open("a", encoding="utf-8") as f:
        held = False
        while not held and not stop.is_set():
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if not waited:
                    log({"time": datetime.now(UTC), "level": "info", "event": "Standby",
                         "message": f"another controller holds {state.lock}; waiting"})
                waited = True
                stop.wait(poll_s)
        yield held


def run(
    state: StateFolder, look_seconds: float, stop: threading.Event, *, log: Log = print_json, settings: ControllerSettings | None = None,
) -> None:
    """Turns until `stop` is set, at most `look_seconds` apart. Raises StateError or OSError when notifications can't be set up."""
    given = settings or ControllerSettings()
    with only_one(state, stop, log) as held:
        if not held:
            return
        log({"time": datetime.now(UTC), "level": "info", "event": "Leading", "message": f"looking every {look_seconds:g} s"})
        notifier = Notifier(given.notifications, FileCursors(state.notifications), log)
        starter = CommandStarter(given.retraining.command, given.retraining.command_deadline, state.retraining) if (
            given.retraining.policy == "start" and given.retraining.command) else None
        retraining = RetrainingTrigger(given.retraining, FileAttempts(state.retraining), starter, log)
        companions = Companions(log, lambda s: state.record(s.name), given.record.limits, notifier, retraining)
        controller = Controller(state, log=log, companions=companions)
        companions.start()
        try:
            while not stop.is_set():
                soon = controller.turn()
                stop.wait(look_seconds if soon is None else min(soon, look_seconds))
        finally:
            companions.stop()
        log({"time": datetime.now(UTC), "level": "info", "event": "Stopped", "message": "asked to end"})
