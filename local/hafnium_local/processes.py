"""A supervised child process: started, watched, restarted, stopped, and never left behind.

Each child leads a process group of its own, so that Ctrl-C in the terminal reaches only the supervisor, and so that stopping
the child stops what it started. The kernel is told to kill the child when the supervisor dies (PR_SET_PDEATHSIG), which holds
also for `kill -9`. Two traps: the kernel means the *thread* that forked, so children are started from the main thread only;
and it does not reach grandchildren, so each child's environment carries a mark by which the next supervisor finds and ends
what the last one left (`kill_leftovers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hafnium_contract.lifeline import tied_to_parent
from hafnium_local.ports import is_free
from hafnium_local.probes import Probe, ProbeResult, ask

MARK = "HAFNIUM_SUPERVISED_BY"
LOG_BYTES_MAX = 10 * 1024 * 1024
"""Per process, and once more for the rotated half: a week of warnings, not a full disk."""
LAST_LINES = 3
UNREADY_AFTER = 3
"""Probes without an answer, one after another, until a process is no longer called ready: one is lost on a busy machine easily."""
SILENT_MAX = 8
"""And until it counts as hung and is killed: 8 × (1 s + 2 s). A machine with six times more work than cores was seen to hold
back a healthy process for two such probes."""
START_TIMEOUT_S = 180.0
"""A process that answers nothing for so long after its start is started again. Importing feast on a busy machine takes 20 s."""
GROUP_GONE_S = 2.0
"""What SIGKILL needs at most to end workers of some gigabytes."""
STEADY_S = 10.0
"""A process that lived so long is not in a crash loop: its next restart is quick again."""


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. Two equal specs need no restart."""

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    """Added to the supervisor's environment."""
    cwd: str | None = None
    probe: Probe | None = None
    """None: running is ready."""
    grace_s: float = 10.0
    """Between SIGTERM and SIGKILL."""
    start_timeout_s: float = START_TIMEOUT_S


@dataclass
class ChildState:
    """What is known of a child. `message` is a sentence for people, empty when all is well."""

    pid: int | None = None
    ready: bool = False
    restarts: int = 0
    message: str = "not started"
    last_exit: str = ""
    was_ready: bool = field(default=False)


def restart_delay_s(quick_exits: int) -> float:
    """Pause before a restart, by the number of exits in a row that came soon after the start: 0, 0.25, 0.5, … 10 s."""
    return 0.0 if quick_exits <= 1 else min(10.0, 0.25 * 2.0 ** (min(quick_exits, 10) - 2))


class Child:
    """One process under supervision. `run` is its whole life; `stop` ends it."""

    def __init__(self, spec: ProcessSpec, log: Path, state_folder: Path, on_change: Callable[[Child], None]) -> None:
        self.spec = spec
        self.log = log
        self.state = ChildState()
        self._folder = state_folder
        self._on_change = on_change
        self._stop = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._quick_exits = 0

    async def run(self) -> None:
        """Keeps the process running until `stop`. Cancelling it kills the process at once."""
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                if self._start():
                    reason = await self._watch()
                    self._quick_exits = 0 if time.monotonic() - started > STEADY_S else self._quick_exits
                    if self._stop.is_set():
                        break
                    self.state.last_exit = reason
                self._quick_exits += 1
                delay = restart_delay_s(self._quick_exits)
                self.state.restarts += 1
                self._changed(ready=False, message=f"{self.state.last_exit}; starts again" + (f" in {delay:g} s" if delay else ""))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stop.wait()
        finally:
            self.kill()
            self._changed(ready=False, message="stopped")

    def stop(self) -> None:
        """Asks the process to end: SIGTERM, and SIGKILL after the grace. Returns at once; `run` returns when it is gone."""
        self._stop.set()

    def kill(self) -> None:
        """SIGKILL to the process and all that it started; a process that is gone is fine."""
        process = self._process
        if process is None:
            return
        _kill_group(process.pid)
        process.wait()
        self._process = None
        self.state.pid = None

    def _start(self) -> bool:
        probe = self.spec.probe
        if probe is not None and not is_free(probe.port):
            # whoever listens there would answer the probe while this process starts, and be taken for it
            self.state.last_exit = f"port {probe.port} is taken by another program"
            return False
        environment = {**os.environ, **dict(self.spec.env), MARK: str(self._folder.resolve())}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self.spec.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                    cwd=self.spec.cwd, process_group=0, preexec_fn=tied_to_parent(),
                )
        except (OSError, subprocess.SubprocessError) as e:
            self.state.last_exit = f"can't start {self.spec.argv[0]}: {e}"
            return False
        self.state.pid = self._process.pid
        self.state.was_ready = False
        self._changed(ready=self.spec.probe is None, message="" if self.spec.probe is None else "starting")
        return True

    async def _watch(self) -> str:
        """Until the process is gone, for whatever reason; returns that reason."""
        process = self._process
        assert process is not None  # noqa: S101 - set by _start
        gone = asyncio.get_running_loop().create_future()
        handle = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(handle, lambda: gone.done() or gone.set_result(None))
        probing = asyncio.create_task(self._probe())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({gone, probing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            hung = probing.result() if probing.done() and not gone.done() and not self._stop.is_set() else None
            if not gone.done():
                if hung is None:
                    self._changed(ready=False, message="stopping")
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                    await asyncio.wait({gone}, timeout=self.spec.grace_s)
                # a hung process does not get a grace: it had SILENT_MAX chances
                _kill_group(process.pid)
            status = process.wait()
            _kill_group(process.pid)  # what it had started itself
            self._process = None
            self.state.pid = None
            await _group_gone(process.pid)
            return hung or self._exit_reason(status)
        finally:
            probing.cancel()
            stopping.cancel()
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)

    async def _probe(self) -> str:
        """Follows readiness; returns only when the process counts as hung, with the reason."""
        probe = self.spec.probe
        started = time.monotonic()
        silent = 0
        while True:
            if probe is None:
                await self._rotate()
                await asyncio.sleep(1.0)
                continue
            found = await ask(probe)
            silent = silent + 1 if found.state == "silent" else 0
            if found.state == "ready":
                self.state.was_ready = True
            self._report(found, silent)
            if self.state.was_ready and silent >= SILENT_MAX:
                return f"hung: no answer from {_where(probe)} {silent} times in a row ({found.message})"
            if not self.state.was_ready and silent and time.monotonic() - started > self.spec.start_timeout_s:
                return f"gave no answer from {_where(probe)} within {self.spec.start_timeout_s:g} s of its start"
            await self._rotate()
            await asyncio.sleep(probe.period_s if self.state.was_ready else min(0.2, probe.period_s))

    def _report(self, found: ProbeResult, silent: int) -> None:
        if found.state == "ready":
            self._changed(ready=True, message="")
        elif found.state == "unready":
            self._changed(ready=False, message=f"not ready: {found.message}")
        elif self.state.was_ready and silent >= UNREADY_AFTER:
            self._changed(ready=False, message=f"does not answer: {found.message}")

    async def _rotate(self) -> None:
        """Copy and truncate: the child appends (O_APPEND), so it goes on at the new end without knowing."""
        try:
            if self.log.stat().st_size > LOG_BYTES_MAX:
                shutil.copyfile(self.log, self.log.with_suffix(self.log.suffix + ".1"))
                os.truncate(self.log, 0)
        except OSError:
            return  # a disk that is full or a log that was deleted must not end the process that logs

    def _exit_reason(self, status: int) -> str:
        if status < 0:
            try:
                how = f"killed by {signal.Signals(-status).name}"
            except ValueError:
                how = f"killed by signal {-status}"
        else:
            how = f"ended with status {status}"
        lines = last_lines(self.log, LAST_LINES)
        return f"{how}; last lines: {' | '.join(lines)}" if lines else how

    def _changed(self, *, ready: bool, message: str) -> None:
        if (self.state.ready, self.state.message) != (ready, message):
            self.state.ready, self.state.message = ready, message
            self._on_change(self)


def _where(probe: Probe) -> str:
    return f"{probe.host}:{probe.port}{probe.path or ' (TCP)'}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _group_gone(pid: int) -> None:
    """Until none of a killed group is left, for a moment: a worker gives back its memory before its port, and the next start would
    meet that port taken by a stranger. Zombies count as left, so where nobody reaps orphans (a container without an init) it takes all
    of the moment."""
    deadline = time.monotonic() + GROUP_GONE_S
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(pid, 0)
            await asyncio.sleep(0.01)


def last_lines(file: Path, count: int, bytes_max: int = 8192) -> list[str]:
    """The last lines of a text file that are not empty, each cut at 300 characters; none when it can't be read."""
    try:
        with file.open("rb") as f:
            f.seek(max(0, file.stat().st_size - bytes_max))
            text = f.read(bytes_max).decode("utf-8", "replace")
    except OSError:
        return []
    return [line.strip()[:300] for line in text.splitlines() if line.strip()][-count:]


def kill_leftovers(state_folder: Path, wait_s: float = 5.0) -> list[int]:
    """Ends processes that carry this state folder's mark, left by a supervisor that was killed. Returns their pids.

    Call it only while holding the state folder's lock: a live supervisor's children carry the same mark.
    """
    mark = f"{MARK}={state_folder.resolve()}".encode()
    spared = _ancestors()
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
                found.append(int(entry.name))
    deadline = time.monotonic() + wait_s
    while any(_running(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ancestors() -> set[int]:
    """This process and those above it, which may carry the mark too when a supervisor is started by a child of another."""
    out = {os.getpid()}
    pid = os.getppid()
    while pid > 1 and pid not in out:
        out.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:
            break
    return out


def python_module(module: str, *args: str) -> tuple[str, ...]:
    """argv of `python -m module …` with this interpreter, unbuffered so that the log is there when it is needed."""
    return (sys.executable, "-u", "-m", module, *args)


def merged(*parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Environments on top of each other, as ProcessSpec.env holds them."""
    out: dict[str, str] = {}
    for part in parts:
        out.update(part)
    return tuple(out.items())
