"""`hafnium up` without the command line: a supervisor in a process of its own, for the tests to kill. Run by path."""

from __future__ import annotations

import sys
from pathlib import Path

from hafnium_contract.errors import HafniumError
from hafnium_local.runtime import run


def main() -> int:
    state, port, *files = sys.argv[1:]
    try:
        return run(
            [Path(f) for f in files], Path(state), int(port) or None, lambda text: print(text, flush=True), look_seconds=1.0  # noqa: T201
        )
    except HafniumError as e:
        print(f"error: {e}", flush=True)  # noqa: T201
        return e.exit_status


if __name__ == "__main__":
    sys.exit(main())
