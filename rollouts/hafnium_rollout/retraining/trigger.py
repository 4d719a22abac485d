"""The shell around decide_retraining: attempts as files, and what starts them.

The intent is written first, so a crash costs none; and that it is being started is written right before it is, so none is started twice:
who finds an attempt there was cut off in between, looks for the training, and starts it at no price again. One that ran and was
cleaned up meanwhile (a RayJob has a TTL) can't be told from one that never was; it is Unknown, and a person hears of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from hafnium_contract.durations import Duration, format_duration
from hafnium_contract.errors import HafniumError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_contract.whole_files import write_atomically
from hafnium_rollout.errors import NotLeading, StateError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import HISTORY_MAX, Attempt, RetrainingPolicy, decide_retraining
from hafnium_rollout.status import HistoryPoint, ModelSeen, RolloutStatus

Log = Callable[[dict[str, Any]], None]
_ATTEMPTS = TypeAdapter(tuple[Attempt, ...])


class Retraining(RetrainingPolicy):
    """The policy and, for `start`, what to start."""

    command: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """On one machine: a program and its arguments, never a shell's line. HAFNIUM_RETRAINING_* tells it what for."""
    command_deadline: Duration = timedelta(hours=12)
    """The command and its children are ended after that."""
    ray_job_template: Path | None = None
    """On a cluster: a RayJob (YAML), from a ConfigMap. Name, namespace and labels are filled in."""

    @model_validator(mode="after")
    def _startable(self) -> Self:
        if self.policy == "start" and not self.command and self.ray_job_template is None:
            raise ValueError("policy start needs `command` (one machine) or `rayJobTemplate` (cluster)")
        if self.command and self.ray_job_template is not None:
            raise ValueError("give one of `command` and `rayJobTemplate`")
        return self


class Starter(Protocol):
    """Starts a training for an attempt: once, however often it is asked with the same id."""

    def start(self, attempt: Attempt, rollout: ModelRollout, stable: ModelSeen, proposal: str) -> Attempt:
        """The attempt as Started, Failed or Unknown. Raises OSError or HafniumError when it should be tried again."""
        ...

    def find(self, attempt: Attempt, rollout: ModelRollout) -> Attempt:
        """Of an attempt whose start was cut off: Started when there is such a training, else Unknown. Starts none. Raises as `start`."""
        ...

    def look(self, attempt: Attempt) -> Attempt:
        """A started attempt as it is now."""
        ...


class Attempts(Protocol):
    """Where a rollout's attempts are kept, by `namespace/name`."""

    def load(self, key: str) -> tuple[Attempt, ...]: ...

    def save(self, key: str, attempts: Sequence[Attempt]) -> None: ...


class FileAttempts:
    """One JSON file for each rollout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str) -> tuple[Attempt, ...]:
        """Raises StateError when they can't be read: without them the cool-down isn't known, so nothing is done."""
        path = self._folder / f"{key}.json"
        try:
            return _ATTEMPTS.validate_python(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, ValidationError) as e:
            raise StateError(f"{path}: can't be read, so no training is proposed; repair it or move it away: {e}") from e

    def save(self, key: str, attempts: Sequence[Attempt]) -> None:
        # no nulls: the release before refuses fields that it doesn't know, and so only attempts that have times keep it from reading
        data = _ATTEMPTS.dump_json(tuple(attempts[-HISTORY_MAX:]), indent=1, exclude_none=True)
        write_atomically(self._folder / f"{key}.json", data.decode())


class CommandStarter:
    """Runs the configured command, detached: a restart of the controller must not end a training."""

    def __init__(self, command: Sequence[str], deadline: timedelta, folder: Path) -> None:
        self._command = tuple(command)
        self._deadline_s = deadline.total_seconds()
        self._folder = folder
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def start(self, attempt: Attempt, rollout: ModelRollout, stable: ModelSeen, proposal: str) -> Attempt:
        marker = self._folder / f"{attempt.id}.started"
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{attempt.id}.json"
        write_atomically(file, proposal)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return self.find(attempt, rollout)
        environment = os.environ | {
            "HAFNIUM_RETRAINING_ID": attempt.id, "HAFNIUM_RETRAINING_ROLLOUT": rollout.name,
            "HAFNIUM_RETRAINING_MODEL": rollout.spec.model.name, "HAFNIUM_RETRAINING_STABLE_DIGEST": stable.digest,
            "HAFNIUM_RETRAINING_STABLE_URI": stable.storage_uri, "HAFNIUM_RETRAINING_KIND": attempt.kind,
            "HAFNIUM_RETRAINING_PROPOSAL": str(file.resolve()),
        }
        try:
            with (self._folder / f"{attempt.id}.log").open("wb") as log:
                process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                           env=environment, start_new_session=True)
        except OSError as e:
            return attempt.model_copy(update={"state": "Failed", "detail": f"{self._command[0]}: {e.strerror or e}"})
        self._running[attempt.id] = (process, time.monotonic())
        return attempt.model_copy(update={"state": "Started", "detail": f"process {process.pid}: {self._command[0]}"})

    def find(self, attempt: Attempt, rollout: ModelRollout) -> Attempt:
        del rollout
        text = f"it was being started when the controller ended; see {attempt.id}.log"
        return attempt.model_copy(update={"state": "Unknown", "detail": text})

    def look(self, attempt: Attempt) -> Attempt:
        found = self._running.get(attempt.id)
        if found is None:
            return attempt  # of an earlier controller: its end isn't seen from here
        process, started = found
        code = process.poll()
        if code is None and time.monotonic() - started > self._deadline_s:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            del self._running[attempt.id]
            return attempt.model_copy(update={"state": "Failed", "detail": f"ended after its deadline of {self._deadline_s:g} s"})
        if code is None:
            return attempt
        del self._running[attempt.id]
        return attempt.model_copy(update={"state": "Succeeded" if code == 0 else "Failed", "detail": f"exit status {code}"})


@dataclass
class RetrainingTrigger:
    """Asked once a turn for each rollout."""

    settings: Retraining
    attempts: Attempts
    starter: Starter | None
    log: Log

    def turn(
        self, rollout: ModelRollout, status: RolloutStatus, evidence: Sequence[EvidenceSpec], now: datetime,
    ) -> tuple[HistoryPoint, ...]:
        """Does what is due. Returns what became of all attempts, as events for notifications. Raises StateError, OSError or HafniumError;
        NotLeading when another process does the same by now."""
        if self.settings.policy == "never":
            return ()
        key = f"{rollout.metadata.namespace}/{rollout.name}"
        history = self.attempts.load(key)
        decision = decide_retraining(self.settings, rollout.name, status, evidence, history, now)
        if decision.attempt is not None:
            history = (*history, decision.attempt)
            self.attempts.save(key, history)  # the intent first: after a crash it is found here, and no second one is made
            self.log({"time": now, "level": "warning", "rollout": rollout.name, "event": f"Retraining{decision.attempt.state}",
                      "message": decision.attempt.message, "id": decision.attempt.id, "alert": decision.attempt.state == "Proposed"})
        for number, attempt in enumerate(history):
            after = self._carried_on(key, history, number, rollout, status, now)
            if after != attempt:
                after = _timed(attempt, after, now)
                history = (*history[:number], after, *history[number + 1:])
                self.attempts.save(key, history)
                level = "error" if after.state in ("Failed", "Unknown") else "info"
                self.log({"time": now, "level": level, "rollout": rollout.name, "event": f"Retraining{after.state}", "id": after.id,
                          "message": after.detail})
        return tuple(point for a in history for point in _points(a))

    def _carried_on(
        self, key: str, history: Sequence[Attempt], number: int, rollout: ModelRollout, status: RolloutStatus, now: datetime,
    ) -> Attempt:
        """One attempt as it is after this turn. Raises NotLeading."""
        attempt, stable, within = history[number], status.stable, self.settings.start_within
        if attempt.state == "Intended":
            if stable is None or stable.digest != attempt.digest:
                return attempt.model_copy(update={"state": "Failed", "detail": "another model is stable by now"})
            if now - attempt.time > within:
                why = attempt.detail or "nothing here starts trainings"
                text = f"it couldn't be started within {format_duration(within)} ({why}); new findings bring a new attempt"
                return attempt.model_copy(update={"state": "Failed", "detail": text})
        if self.starter is None:
            return attempt
        try:
            if attempt.state == "Started":
                return self.starter.look(attempt)
            if attempt.state == "Starting":
                return self.starter.find(attempt, rollout)
            if attempt.state == "Intended" and stable is not None:
                starting = attempt.model_copy(update={"state": "Starting"})
                self.attempts.save(key, (*history[:number], starting, *history[number + 1:]))
                return self.starter.start(attempt, rollout, stable, proposal(attempt, rollout, stable))
        except NotLeading:
            raise
        except (OSError, HafniumError) as e:
            if attempt.state != "Intended":
                raise
            after = attempt.model_copy(update={"detail": f"can't be started yet: {e}"[:500]})
            if after == attempt:
                self.attempts.save(key, history)  # it isn't being started: that was refused
            return after
        return attempt


def _timed(before: Attempt, after: Attempt, now: datetime) -> Attempt:
    """With the time at which it came to its state."""
    if after.state == before.state:
        return after
    if after.state == "Started":
        return after.model_copy(update={"started_at": now})
    return after.model_copy(update={"ended_at": now}) if after.state in ("Succeeded", "Failed", "Unknown") else after


def _points(attempt: Attempt) -> Iterator[HistoryPoint]:
    """What receivers hear of it: what has come about, when it did. An intent alone is nothing yet: it is started, or fails and says so.

    The release before told of each attempt that it was started, at the time of its intent, and wrote no other times. What was true of that
    keeps its time, and so its id; of the rest nothing is told so late.
    """
    def point(event: str, time: datetime, text: str) -> HistoryPoint:
        return HistoryPoint(time=time, event=event, weight=0, reason=attempt.kind, message=f"{text} ({attempt.id})", alert=True)

    if attempt.state == "Proposed":
        yield point("RetrainingProposed", attempt.time, attempt.message)
    elif attempt.started_at is not None or attempt.state in ("Started", "Succeeded"):
        yield point("RetrainingStarted", attempt.started_at or attempt.time, attempt.message)
    if attempt.state in ("Failed", "Unknown") and attempt.ended_at is not None:
        yield point(f"Retraining{attempt.state}", attempt.ended_at, f"{attempt.detail}; {attempt.message}")


def proposal(attempt: Attempt, rollout: ModelRollout, stable: ModelSeen) -> str:
    """The record that a person or a training reads."""
    return json.dumps({
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "RetrainingProposal", "id": attempt.id, "time": attempt.time.isoformat(),
        "rollout": {"namespace": rollout.metadata.namespace, "name": rollout.name}, "model": rollout.spec.model.name,
        "stable": stable.model_dump(by_alias=True),
        "because": {"kind": attempt.kind, "findings": attempt.findings, "message": attempt.message},
    }, indent=1)
