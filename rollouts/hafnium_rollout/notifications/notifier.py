"""All receivers together: what the controller holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hafnium_rollout.notifications.alertmanager import AlertmanagerCourier
from hafnium_rollout.notifications.courier_thread import Log
from hafnium_rollout.notifications.cursors import Cursors
from hafnium_rollout.notifications.notices import Subject
from hafnium_rollout.notifications.settings import Notifications
from hafnium_rollout.notifications.webhook import WebhookCourier
from hafnium_rollout.status import RolloutStatus


class Notifier:
    """Offers statuses to every receiver. Only the controller that leads may: two would send everything twice."""

    def __init__(self, settings: Notifications, cursors: Cursors, log: Log, leads: Callable[[], bool] = lambda: True) -> None:
        """Raises StateError when it can't be read what a receiver was sent, OSError when that can't be written.

        `leads` is asked before each sending: a process that was stopped for a while and goes on knows it before anybody tells it.
        """
        self._couriers: Sequence[WebhookCourier | AlertmanagerCourier] = (
            *(WebhookCourier(w, cursors, log, leads=leads) for w in settings.webhooks),
            *(AlertmanagerCourier(a, log, leads=leads) for a in settings.alertmanagers),
        )

    def start(self) -> None:
        for courier in self._couriers:
            courier.start()

    def lead(self) -> None:
        """This process leads from now on."""
        for courier in self._couriers:
            courier.lead()

    def rest(self) -> None:
        """This process doesn't lead any more: nothing is sent until it does again."""
        for courier in self._couriers:
            courier.rest()

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
