"""The rollout loop as a process.

`python -m hafnium_rollout --state DIR` guards the rollouts of a state folder on one machine (`local` may be written before it);
`python -m hafnium_rollout operator` guards the ModelRollouts of a Kubernetes cluster. Both until SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from hafnium_contract.errors import HafniumError, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["operator"]:
            return _operator(given[1:])
        return _local(given[1:] if given[:1] == ["local"] else given)
    except HafniumError as e:
        sys.stderr.write(f"hafnium_rollout: {e}\n")
        return e.exit_status


def _local(arguments: Sequence[str]) -> int:
    from hafnium_rollout.controller import run
    from hafnium_rollout.controller_settings import FILE_NAME, ControllerSettings, load_settings
    from hafnium_rollout.state_folder import StateFolder

    parser = argparse.ArgumentParser(prog="hafnium_rollout", description="Moves traffic between models as the evidence allows.")
    parser.add_argument("--state", type=Path, required=True, help="state folder of `hafnium up`")
    parser.add_argument("--look-seconds", type=float, default=5.0, help="time between two looks (default: 5)")
    parser.add_argument("--settings", type=Path, help="settings file (default: rollout-settings.yaml in the state folder, if it is there)")
    given = parser.parse_args(arguments)
    if not 0.1 <= given.look_seconds <= 3600:
        parser.error(f"--look-seconds must lie between 0.1 and 3600, got {given.look_seconds:g}")
    path = given.settings or given.state / FILE_NAME
    settings = load_settings(path) if given.settings is not None or path.is_file() else ControllerSettings()
    if settings.retraining.ray_job_template is not None:
        raise InputError(f"{path}: retraining.rayJobTemplate needs a cluster; on one machine give retraining.command")
    run(StateFolder(given.state), given.look_seconds, _until_asked(), settings=settings)
    return 0


def _operator(arguments: Sequence[str]) -> int:
    # One machine needs neither the `kubernetes` package nor the second that it takes to load.
    from hafnium_rollout.kubernetes.operator import run
    from hafnium_rollout.kubernetes.settings import parse_settings

    run(parse_settings(arguments), _until_asked())
    return 0


def _until_asked() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop


if __name__ == "__main__":
    sys.exit(main())
