"""A second Python process that loads a slow library while this one trains.

MLflow takes seven seconds to import and Ray as long to start, both holding the interpreter lock, so a thread would only slow the
training down. A process of its own uses the second core, and a library that ends its process (Ray does when its raylet is gone) ends
that one only. It serves one module's functions over a pipe, and ends with the process that started it. One that dies is started
again, and what it was asked is asked again, so the functions must bear that. The pickles on the pipe are this package's own.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hafnium_contract.errors import HafniumError
from hafnium_contract.lifeline import tied_to_parent
from hafnium_contract.progress import Progress

CALL_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 10.0
ERROR_TEXT_MAX = 2_000
STARTS_MAX = 2
"""Of a process whose `warm_up` fails: what was away when it began may be back when it is needed."""
RESTARTS_MAX = 3
"""A library that ends its process every time is not bad luck any more."""
ANSWERED, FAILED, TOLD = range(3)
WARM_UP = "warm_up"
_SIZE = struct.Struct("!Q")


class HelperDiedError(HafniumError):
    """The process is gone. `how` it ended; the message also has what it said last."""

    def __init__(self, how: str, said: str) -> None:
        super().__init__(f"{how}: {said}")
        self.how = how


class HelperTimeoutError(HafniumError):
    """The process gave no answer in time; it may still be at work."""


class HelperProcess:
    """Runs functions of `module` elsewhere. `module.warm_up(*args)`, if there is one, is called at once, without waiting for it.

    The first call waits for it. Where it failed, it is tried once more in a new process; its second failure is that call's.
    Start it from the main thread (see lifeline.py).
    """

    def __init__(self, module: str, *warm_up: Any) -> None:
        self.module = module
        self._warm_up = warm_up
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hafnium_training.helper_process", self.module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment, preexec_fn=tied_to_parent(),
        )
        self._pending = 0
        self._warm: bool | None = None  # None: `warm_up` has not answered yet
        with contextlib.suppress(HelperDiedError):  # the first call will see it too, and start it again
            self._send(WARM_UP, self._warm_up)

    def call(self, function: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S, progress: Progress | None = None) -> Any:
        """Result of `module.function(*args)`. A HafniumError there is raised here; anything else becomes one, with its text.

        With `progress` the function gets one too, as the keyword `progress`; what it tells there is told here. When the process
        dies, it is started and asked again, RESTARTS_MAX times; then HelperDiedError. `timeout_s` is for each attempt, and begins anew
        whenever the function tells something: HelperTimeoutError means so long a silence.
        """
        for attempt in range(RESTARTS_MAX + 1):
            try:
                return self._ask(function, args, timeout_s, progress)
            except HelperDiedError as e:
                if attempt == RESTARTS_MAX:
                    raise
                if progress is not None:
                    progress.event(f"{e.how}; starting it again")
                self.restart()
        raise AssertionError("the loop returns or raises")

    def restart(self) -> None:
        """A new process in place of this one, whatever state it is in."""
        self.close()
        self._start()

    def _ask(self, function: str, args: tuple[Any, ...], timeout_s: float, progress: Progress | None) -> Any:
        self._await_warm_up(timeout_s)
        self._send(function, args, heard=progress is not None)
        kind, answer = FAILED, None
        while self._pending:  # an earlier call that ran out of time is answered first
            kind, answer = self._answer(timeout_s, progress)
        if kind == FAILED:
            raise self._error(answer)
        return answer

    def _await_warm_up(self, timeout_s: float) -> None:
        answer: Any = None
        for _ in range(STARTS_MAX):
            if self._warm is False:
                self.restart()
            if self._warm:
                return
            kind, answer = self._answer(timeout_s, None)
            self._warm = kind == ANSWERED
        if not self._warm:
            raise self._error(answer)

    def _answer(self, timeout_s: float, progress: Progress | None) -> tuple[int, Any]:
        """The next answer; what is told before it is passed on."""
        while True:
            kind, answer = self._receive(time.monotonic() + timeout_s)
            if kind != TOLD:
                self._pending -= 1
                return kind, answer
            name, told = answer
            if progress is not None:
                getattr(progress, name)(*told)

    def _error(self, answer: Any) -> HafniumError:
        return answer if isinstance(answer, HafniumError) else HafniumError(f"{self.module}: {answer}")

    def _send(self, function: str, args: tuple[Any, ...], *, heard: bool = False) -> None:
        data = pickle.dumps((function, args, heard))
        try:
            pipe = _given(self._process.stdin)
            pipe.write(_SIZE.pack(len(data)) + data)
            pipe.flush()
        except OSError as e:
            raise self._died() from e
        self._pending += 1

    def _receive(self, deadline: float) -> tuple[int, Any]:
        (size,) = _SIZE.unpack(self._read(_SIZE.size, deadline))
        return pickle.loads(self._read(size, deadline))  # noqa: S301 - written by our own child

    def _read(self, count: int, deadline: float) -> bytes:
        descriptor = _given(self._process.stdout).fileno()
        out = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(out) < count:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise HelperTimeoutError(f"the helper process for {self.module} gave no answer in time")
                part = os.read(descriptor, count - len(out))
                if not part:
                    raise self._died()
                out += part
        return bytes(out)

    def _died(self) -> HelperDiedError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        status = self._process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status is not None and status < 0 else f"ended with status {status}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-ERROR_TEXT_MAX:].strip() or "it said nothing"
        return HelperDiedError(f"the helper process for {self.module} {how}", said)

    def close(self) -> None:
        """Ends the process; one that doesn't end by itself is killed."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                _given(pipe).close()
            except OSError:
                continue  # it is gone already
        if self._pending:
            self._process.kill()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PipedProgress:
    """A Progress at the helper's end of the pipe."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target

    def stage(self, name: str, total: int) -> None:
        """Told to the parent."""
        _write(self._target, TOLD, ("stage", (name, total)))

    def advance(self, count: int = 1) -> None:
        """Told to the parent."""
        _write(self._target, TOLD, ("advance", (count,)))

    def event(self, text: str) -> None:
        """Told to the parent."""
        _write(self._target, TOLD, ("event", (text,)))


def _write(target: IO[bytes], kind: int, what: Any) -> None:
    data = pickle.dumps((kind, what))
    target.write(_SIZE.pack(len(data)) + data)
    target.flush()


def _given(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise HafniumError("the helper process has no pipe")
    return pipe


def serve(module: str, source: IO[bytes], target: IO[bytes]) -> None:
    """Answers calls until `source` ends."""
    functions = importlib.import_module(module)
    while header := source.read(_SIZE.size):
        name, args, heard = pickle.loads(source.read(_SIZE.unpack(header)[0]))  # noqa: S301 - written by our own parent
        more = {"progress": PipedProgress(target)} if heard else {}
        try:
            if name == WARM_UP and not hasattr(functions, WARM_UP):
                kind, answer = ANSWERED, None
            else:
                kind, answer = ANSWERED, getattr(functions, name)(*args, **more)
        except HafniumError as e:
            kind, answer = FAILED, e
        except Exception as e:  # noqa: BLE001 - every failure of a library has to reach the parent, which raises it
            kind, answer = FAILED, f"{type(e).__name__}: {e}"[:ERROR_TEXT_MAX]
        try:
            _write(target, kind, answer)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    # What libraries print must not mix with the answers: they get standard error as their standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path = [p for p in sys.path if p and Path(p) != Path.cwd()]
    serve(sys.argv[1], sys.stdin.buffer, answers)
