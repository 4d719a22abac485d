"""Kubernetes events of a rollout: what happened, for `kubectl describe` and for people who are called.

The status is the truth and holds the history; an event that can't be written is no reason to stop. An event's name follows from
what it tells, so a turn that is repeated after a crash doesn't tell it twice.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from hafnium_rollout.actions import Event
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, KubernetesError
from hafnium_rollout.kubernetes.kinds import EVENT, MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.objects_seen import Meta

NOTE_CHARACTERS_MAX = 1_000
"""The API server takes 1,024 bytes of a message."""
COMPONENT = "hafnium-rollout"


def kubernetes_event(meta: Meta, event: Event, now: datetime, instance: str) -> Json:
    """The object for one event. Pure."""
    stamp = now.astimezone(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")
    key = f"{meta.uid}/{event.name}/{event.reason}/{event.message}/{stamp}"
    message = event.message.encode()[:NOTE_CHARACTERS_MAX].decode("utf-8", "ignore")
    return {
        "metadata": {"name": f"{meta.name[:200]}.{hashlib.sha256(key.encode()).hexdigest()[:16]}", "namespace": meta.namespace},
        "involvedObject": {"apiVersion": MODEL_ROLLOUT.api_version, "kind": MODEL_ROLLOUT.name, "namespace": meta.namespace,
                           "name": meta.name, "uid": meta.uid, "resourceVersion": meta.resource_version},
        "type": "Warning" if event.alert else "Normal", "reason": event.name, "message": message or event.name,
        "source": {"component": COMPONENT}, "reportingComponent": COMPONENT, "reportingInstance": instance[:128], "count": 1,
        "firstTimestamp": stamp, "lastTimestamp": stamp,
    }


def record(client: KubernetesClient, meta: Meta, event: Event, now: datetime, instance: str) -> str:
    """Writes one event. Returns why it couldn't be written, empty when it is there."""
    try:
        client.create(EVENT, kubernetes_event(meta, event, now, instance))
    except Conflict:
        return ""  # told before
    except KubernetesError as e:
        return str(e)
    return ""
