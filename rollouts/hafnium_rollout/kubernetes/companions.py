"""The operator's companions, from its settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hafnium_contract.errors import InputError
from hafnium_rollout.companions import Companions
from hafnium_rollout.controller_settings import ControllerSettings, load_settings
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.leader import Leader
from hafnium_rollout.kubernetes.ray_jobs import RayJobStarter, read_template
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.notifications.cursors import FileCursors
from hafnium_rollout.notifications.notifier import Notifier
from hafnium_rollout.retraining.trigger import FileAttempts, RetrainingTrigger

Log = Callable[[dict[str, Any]], None]


TELLING_DEADLINE_S = 5.0
"""Of one call that is no part of guarding. It comes after the turn's actions, but before the next turn of the rollout."""


def companions_of(settings: Settings, client: KubernetesClient, log: Log, leader: Leader) -> Companions:
    """Record, receivers and retraining as the settings say. Raises InputError for what can't work, before anything is guarded."""
    given = load_settings(settings.settings_file) if settings.settings_file is not None else ControllerSettings()
    folder, retraining = settings.data_folder, given.retraining
    if retraining.command:
        raise InputError(f"{settings.settings_file}: retraining.command is for one machine; on a cluster give retraining.rayJobTemplate")
    if folder is None and (given.notifications.webhooks or retraining.policy != "never"):
        raise InputError(
            f"{settings.settings_file}: webhooks and retraining have a memory; give --data_folder, on a volume that outlives the pod")
    cursors = FileCursors((folder or Path()) / "notifications")  # without a folder no receiver is left that would have one
    notifier = Notifier(given.notifications, cursors, log, lambda: leader.leading)
    if folder is None:
        return Companions(log, notifier=notifier, fence=leader.check)
    starter = RayJobStarter(client.hurried(TELLING_DEADLINE_S), read_template(retraining.ray_job_template)) if (
        retraining.policy == "start" and retraining.ray_job_template is not None) else None
    return Companions(
        log, lambda s: folder / "record" / s.namespace / f"ModelRollout-{s.name}", given.record.limits, notifier,
        RetrainingTrigger(retraining, FileAttempts(folder / "retraining"), starter, log), leader.check)
