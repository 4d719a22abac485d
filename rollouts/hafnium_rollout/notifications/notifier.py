"""All receivers together: what the controller holds."""

from __future__ import annotations

from collections.abc import Sequence

from hafnium_rollout.notifications.alertmanager import AlertmanagerCourier
from hafnium_rollout.notifications.cursors import Cursors
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.notifications.settings import Notifications
from hafnium_rollout.notifications.webhook import Log, WebhookCourier
from hafnium_rollout.status import RolloutStatus


class Notifier:
    """Offers statuses to every receiver. Only the controller that leads may: two would send everything twice."""

    def __init__(self, settings: Notifications, cursors: Cursors, log: Log) -> None:
        """Raises StateError when it can't be read what a receiver was sent, OSError when that can't be written."""
        self._couriers: Sequence[WebhookCourier | AlertmanagerCourier] = (
            *(WebhookCourier(w, cursors, log) for w in settings.webhooks),
            *(AlertmanagerCourier(a, log) for a in settings.alertmanagers),
        )

    def start(self) -> None:
        for courier in self._couriers:
            courier.start()

    def lead(self) -> None:
        """This process leads from now on."""
        for courier in self._couriers:
            courier.lead()

    def stop(self) -> None:
        for courier in self._couriers:
            courier.stop()

    def offer(self, subject: Subject, status: RolloutStatus) -> None:
        """After the status was written, so that nothing is told that a crash takes back."""
        for courier in self._couriers:
            courier.offer(subject, status)

    def gone(self, subject: Subject) -> None:
        for courier in self._couriers:
            courier.gone(subject)
