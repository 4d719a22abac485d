"""`python -m hafnium_rollout --state DIR --look-seconds 5`: guards all rollouts of a state folder until SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from hafnium_rollout.controller import run
from hafnium_rollout.state_folder import StateFolder


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="hafnium_rollout", description="Moves traffic between models as the evidence allows.")
    parser.add_argument("--state", type=Path, required=True, help="state folder of `hafnium up`")
    parser.add_argument("--look-seconds", type=float, default=5.0, help="time between two looks (default: 5)")
    given = parser.parse_args(arguments)
    if not 0.1 <= given.look_seconds <= 3600:
        parser.error(f"--look-seconds must lie between 0.1 and 3600, got {given.look_seconds:g}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    run(StateFolder(given.state), given.look_seconds, stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
