"""Who is told, and how hard it is tried. Part of the controller's settings file, not of a ModelRollout: receivers belong to the
platform, and an object that anyone may write must not make the controller send requests to addresses of its choice."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from hafnium_contract.durations import Duration
from hafnium_contract.model_contract import MODEL_NAME_PATTERN, Strict

RECEIVERS_MAX = 20
"""Each has a thread."""
Group = Literal["alerts", "phases", "steps"]


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    _ = parts.port  # raises ValueError for one that is none
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"expected http://HOST… or https://HOST…, got {text!r}")
    if parts.username or parts.password:
        raise ValueError("a URL holds no password; use secretFile or tokenFile")
    if parts.fragment:
        raise ValueError("a URL to send to has no #fragment")
    return text


HttpUrl = Annotated[str, AfterValidator(_http_url)]
ReceiverName = Annotated[str, Field(pattern=MODEL_NAME_PATTERN)]


class Receiver(Strict):
    """What every receiver has."""

    name: ReceiverName
    """In logs, and the name of the file that remembers what it was sent: a new name begins anew."""
    url: HttpUrl
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    attempt_timeout: Duration = timedelta(seconds=5)
    """One attempt from connecting to the answer's end. Receivers should queue and answer at once."""
    backoff_first: Duration = timedelta(seconds=1)
    """Wait after a first failure; doubled after each, drawn between half and all of it."""
    backoff_max: Duration = timedelta(minutes=1)
    """Longest wait: so long a receiver that is back may go unnoticed."""

    @model_validator(mode="after")
    def _times(self) -> Self:
        for name in ("attempt_timeout", "backoff_first", "backoff_max"):
            if getattr(self, name) <= timedelta(0):
                raise ValueError(f"{name} must be longer than 0s")
        if self.backoff_max < self.backoff_first:
            raise ValueError("backoffMax must not be shorter than backoffFirst")
        return self


class Webhook(Receiver):
    """A receiver of events: one JSON document per event, in order, at least once."""

    secret_file: Path | None = None
    """Key of the signature (docs/rollout-commands.md). Read for each event, so that it can be changed without a restart."""
    events: tuple[Group, ...] = ("alerts", "phases")
    """alerts: someone should look. phases: begun, paused, resumed, promoted, rolled back. steps: each step up or down."""
    deadline: Duration = timedelta(hours=12)
    """An event that couldn't be sent for so long is given up, with an error in the log: a night's outage loses nothing."""
    queue_max: int = Field(default=1000, ge=1, le=100_000)
    """Events that wait in memory. More stay in the statuses' history and are taken from there when there is room."""


class Alertmanager(Receiver):
    """A receiver of alerts: told again and again while they last, and when they are over."""

    token_file: Path | None = None
    """Bearer token. Read for each request."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Added to every alert: cluster, team, …"""
    resend: Duration = timedelta(minutes=1)
    """Alertmanager forgets what isn't repeated. An alert ends four times as long after the controller has stopped repeating it."""


class Notifications(Strict):
    """All receivers."""

    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=RECEIVERS_MAX)] = ()
    alertmanagers: Annotated[tuple[Alertmanager, ...], Field(max_length=RECEIVERS_MAX)] = ()

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [r.name for r in (*self.webhooks, *self.alertmanagers)]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"receivers named twice: {', '.join(repeated)}")
        return self
