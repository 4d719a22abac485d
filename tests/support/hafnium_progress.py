"""Waiting for a ModelRollout on a cluster: when it doesn't come there, where it stands and what its namespace looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hafnium_kubectl import JSON, Kubectl
from hafnium_operator import until

from hafnium_contract.bundle import Bundle


def stable_is(bundle: Bundle) -> Callable[[JSON], bool]:
    """Whether a status says that this is the live model, at rest."""
    return lambda s: s.get("phase") == "Promoted" and s["stable"]["digest"] == bundle.manifest.digest


def wait_for(
    kubectl: Kubectl, name: str, check: Callable[[JSON], Any], what: str, seconds: float, meanwhile: Callable[[], None] = lambda: None,
) -> JSON:
    """The status of the ModelRollout `name`, once `check(status)` is true. `meanwhile` is done at each look, one a second."""
    def status() -> JSON:
        return kubectl.read("modelrollout", name).get("status", {})

    def found() -> JSON | None:
        meanwhile()
        s = status()
        return s if check(s) else None

    try:
        return until(found, what, seconds, 1.0)
    except AssertionError as e:
        s = status()
        gates = [(g.get("name"), g.get("verdict"), g.get("message")) for g in s.get("gates", [])]
        seen = kubectl.run("get", "isvc,pods,jobs,modelevidences", "-o", "wide").stdout + kubectl.run("get", "events").stdout[-3000:]
        raise AssertionError(f"{e}: {s.get('phase')} {s.get('step')}: {s.get('message')}\n{gates}\n{s.get('conditions')}\n{seen}") from e
