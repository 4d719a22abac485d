"""A second Python process that loads a slow library while this one trains.

The ONNX exporter takes ten seconds to import and MLflow seven, both holding the interpreter lock, so a thread would only slow
the training down. A process of its own uses the second core. It serves one module's functions over a pipe, and ends when the
pipe does, so a killed parent leaves nothing behind. The pickles on the pipe are this package's own.
"""

from __future__ import annotations

import importlib
import os
import pickle
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hafnium_contract.errors import HafniumError

CALL_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 10.0
ERROR_TEXT_MAX = 2_000
_SIZE = struct.Struct("!Q")


class HelperProcess:
    """Runs functions of `module` elsewhere. `module.warm_up(*args)`, if given, is called at once, without waiting for it."""

    def __init__(self, module: str, *warm_up: Any) -> None:
        self.module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hafnium_training.helper_process", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )
        self._pending = 0
        self._send("warm_up", warm_up)

    def call(self, function: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Result of `module.function(*args)`. A HafniumError there is raised here; anything else becomes one, with its text."""
        self._send(function, args)
        answer: Any = None
        while self._pending:
            ok, answer = self._receive(timeout_s)
            self._pending -= 1
            if not ok:
                raise answer if isinstance(answer, HafniumError) else HafniumError(f"{self.module}: {answer}")
        return answer

    def _send(self, function: str, args: tuple[Any, ...]) -> None:
        data = pickle.dumps((function, args))
        try:
            pipe = _given(self._process.stdin)
            pipe.write(_SIZE.pack(len(data)) + data)
            pipe.flush()
        except OSError as e:
            raise HafniumError(f"the helper process for {self.module} ended: {self._last_words()}") from e
        self._pending += 1

    def _receive(self, timeout_s: float) -> tuple[bool, Any]:
        deadline = time.monotonic() + timeout_s
        (size,) = _SIZE.unpack(self._read(_SIZE.size, deadline))
        return pickle.loads(self._read(size, deadline))  # noqa: S301 - written by our own child

    def _read(self, count: int, deadline: float) -> bytes:
        descriptor = _given(self._process.stdout).fileno()
        out = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(out) < count:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise HafniumError(f"the helper process for {self.module} gave no answer in time")
                part = os.read(descriptor, count - len(out))
                if not part:
                    raise HafniumError(f"the helper process for {self.module} ended: {self._last_words()}")
                out += part
        return bytes(out)

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-ERROR_TEXT_MAX:].strip() or "it said nothing"

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


def _given(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise HafniumError("the helper process has no pipe")
    return pipe


def serve(module: str, source: IO[bytes], target: IO[bytes]) -> None:
    """Answers calls until `source` ends."""
    functions = importlib.import_module(module)
    while header := source.read(_SIZE.size):
        name, args = pickle.loads(source.read(_SIZE.unpack(header)[0]))  # noqa: S301 - written by our own parent
        try:
            answer = (True, getattr(functions, name)(*args))
        except HafniumError as e:
            answer = (False, e)
        except Exception as e:  # noqa: BLE001 - every failure of a library has to reach the parent, which raises it
            answer = (False, f"{type(e).__name__}: {e}"[:ERROR_TEXT_MAX])
        data = pickle.dumps(answer)
        try:
            target.write(_SIZE.pack(len(data)) + data)
            target.flush()
        except BrokenPipeError:
            return


if __name__ == "__main__":
    # What libraries print must not mix with the answers: they get standard error as their standard output.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.path = [p for p in sys.path if p and Path(p) != Path.cwd()]
    serve(sys.argv[1], sys.stdin.buffer, answers)
