"""The demo's own child processes: steps that end, and servants that are kept running.

The demo holds no work itself: each step is a `hafnium` command in a process of its own, whose output is on disk when it ends. So a
step that is killed is simply started again, and a killed demo goes on after the last step that was done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hafnium_contract.errors import HafniumError
from hafnium_contract.lifeline import tied_to_parent
from hafnium_local.console import ERROR_FILE
from hafnium_local.processes import last_lines

STEP_ATTEMPTS = 4
"""A step killed this often is not bad luck any more."""
RESTARTS_MAX = 20
"""For a servant, over the whole demo."""
STOP_GRACE_S = 20.0
STEP_GRACE_S = 8.0


class StepFailedError(HafniumError):
    """A step of the demo ended with an error of its own; the message says which, and where to look."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = 2 if exit_status == 2 else 1


@dataclass(frozen=True)
class Surroundings:
    """Where children write their logs, and who hears of what befalls them."""

    logs: Path
    event: Callable[[str], None]


def hafnium(*args: str) -> list[str]:
    """argv of a `hafnium` command with this interpreter."""
    return [sys.executable, "-u", "-m", "hafnium_local", *args]


STEP_NICENESS = 10
"""Steps give way to what serves: with two cores, a training at full priority is what makes live answers late."""


def _spawn(
    argv: list[str], *, stdout: int | None, stderr: int | None, niceness: int = 0, more: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    tie = tied_to_parent()

    def before_exec() -> None:
        tie()
        os.nice(niceness)

    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0, preexec_fn=before_exec,
        env={**os.environ, **(more or {})},
    )


def kill_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Signals a child and what it started; a child that is gone is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


def _end_gently(process: subprocess.Popen[bytes]) -> None:
    """SIGINT and a grace, by which a command cleans up after itself."""
    if process.poll() is not None:
        return
    kill_group(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STEP_GRACE_S)


def run_step(name: str, argv: list[str], around: Surroundings, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Runs a command to its end and returns its standard output; its progress goes to our terminal.

    A command that a signal ended is started again, at most STEP_ATTEMPTS times. `meanwhile` is called a few times a second.
    Raises StepFailedError when it ends with another status than 0.
    """
    around.logs.mkdir(parents=True, exist_ok=True)
    answer, complaint = around.logs / f"{name}.out", around.logs / f"{name}.error"
    complaint.unlink(missing_ok=True)
    errors = {ERROR_FILE: str(complaint)}
    status = 0
    for attempt in range(1, STEP_ATTEMPTS + 1):
        with answer.open("wb") as out:
            process = _spawn(argv, stdout=out.fileno(), stderr=None, niceness=STEP_NICENESS, more=errors)
        try:
            while (polled := process.poll()) is None:
                meanwhile()
                time.sleep(0.1)
        finally:
            _end_gently(process)  # only when we were interrupted
            kill_group(process, signal.SIGKILL)  # also what a step has left behind: Ray's processes outlive a killed driver
            process.wait()
        status = polled
        if status == 0:
            return answer.read_text(encoding="utf-8")
        if status > 0:
            said = " | ".join([*last_lines(complaint, 3), *last_lines(answer, 3)])
            raise StepFailedError(f"{name}: ended with status {status}{': ' + said if said else ''}; ran: {' '.join(argv[1:])}", status)
        around.event(f"{name}: killed by {signal.Signals(-status).name}, starting again ({attempt} of {STEP_ATTEMPTS})")
    raise StepFailedError(f"{name}: killed {STEP_ATTEMPTS} times; last by {signal.Signals(-status).name}")


class Servant:
    """A process that runs beside the acts until it ends or is told to stop; if it is killed before, it is started again."""

    def __init__(self, name: str, argv: list[str], around: Surroundings, niceness: int = 0) -> None:
        self.name = name
        self.restarts = 0
        self._niceness = niceness
        self._argv = argv
        self._around = around
        self._log = around.logs / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._done = False

    def start(self) -> None:
        """Starts the process; its output is appended to `<logs>/<name>.log`."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = _spawn(self._argv, stdout=log.fileno(), stderr=subprocess.STDOUT, niceness=self._niceness)

    @property
    def finished(self) -> bool:
        """It ended by itself with status 0."""
        return self._done

    @property
    def last_line(self) -> str:
        """The last line that it said."""
        return "".join(last_lines(self._log, 1))

    def look(self) -> None:
        """Starts the process again if it died. Raises StepFailedError when it ended with an error or died too often."""
        if self._process is None or self._done:
            return
        status = self._process.poll()
        if status is None:
            return
        kill_group(self._process, signal.SIGKILL)
        if status == 0:
            self._done = True
            return
        if status > 0 or self.restarts >= RESTARTS_MAX:
            raise StepFailedError(f"{self.name}: ended with status {status}: {' | '.join(last_lines(self._log, 3))}; log: {self._log}")
        self.restarts += 1
        self._around.event(f"{self.name}: killed by {signal.Signals(-status).name}, started again")
        self.start()

    def stop(self) -> None:
        """SIGTERM, a grace, SIGKILL; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_GRACE_S)
        kill_group(process, signal.SIGKILL)
        process.wait()
