"""The controller's settings file (YAML): what belongs to the platform and not to one rollout. Read once, at the start.

    notifications: {webhooks: […], alertmanagers: […]}
    retraining: {policy: propose}
    record: {fileBytesMax: 8388608, totalBytesMax: 67108864}
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from hafnium_contract.contract_file import dotted, line_of, read_yaml
from hafnium_contract.errors import ContractError, Problem
from hafnium_contract.model_contract import Strict
from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.notifications.settings import Notifications
from hafnium_rollout.record import RecordLimits
from hafnium_rollout.retraining.trigger import Retraining

FILE_NAME = "rollout-settings.yaml"
"""Looked for in the state folder when no other is named."""
_LIMITS = RecordLimits()


class RecordSettings(Strict):
    """How much of each rollout's turns is kept."""

    file_bytes_max: int = Field(default=_LIMITS.file_bytes_max, ge=100_000, le=1024**3)
    """A file of the record is finished and compressed at this size."""
    total_bytes_max: int = Field(default=_LIMITS.total_bytes_max, ge=1_000_000, le=1024**4)
    """All files of one rollout; beyond it the oldest goes."""

    @property
    def limits(self) -> RecordLimits:
        return RecordLimits(self.file_bytes_max, self.total_bytes_max)


class ControllerSettings(Strict):
    """The whole file."""

    notifications: Notifications = Notifications()
    retraining: Retraining = Retraining()
    record: RecordSettings = RecordSettings()


def load_settings(path: Path) -> ControllerSettings:
    """Reads and checks the file. Raises InputError, or RolloutFileError with every problem and its line."""
    try:
        data, node = read_yaml(path)
    except ContractError as e:
        raise RolloutFileError(e.source, e.problems) from e
    try:
        return ControllerSettings.model_validate({} if data is None else data)
    except ValidationError as e:
        problems = [Problem(dotted(x["loc"]), x["msg"].removeprefix("Value error, "), line_of(node, x["loc"])) for x in e.errors()]
        raise RolloutFileError(str(path), sorted(problems, key=lambda p: p.line or 0)) from e
