"""The commands' store on a cluster: ModelRollouts of one namespace through the API server, with the rights of who asks.

A wish is `spec.action`, merged in under a field manager of the commands' own: of the ModelRollout nothing else is touched,
whoever manages it, and who wished is in managedFields and in the audit log. There is room for one wish. So one that the operator hasn't
acted on is replaced by an Abort only, and the others name the resourceVersion that they saw: who came in between is told, not overwritten.
An approval is a ModelApproval in the name that the
API server knows the caller by; its admission policies check that.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.errors import StateError, UnknownRollout
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import Conflict, NotFound
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_EVIDENCE, MODEL_ROLLOUT, Json, Kind
from hafnium_rollout.kubernetes.objects_seen import approvals_seen, dig, evidence_seen, meta_of, rows, status_of
from hafnium_rollout.objects import ModelApproval, ModelRollout, UserAction, parse_rollout
from hafnium_rollout.standing import Standing, digest_at, known_status, standing_of
from hafnium_rollout.status import RolloutStatus
from hafnium_rollout.stores import Approval

MANAGER = "hafnium-command"
_SELF = Kind("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", namespaced=False)


class KubernetesStore:
    """One namespace. Raises KubernetesError for what the API server refuses, with its words.

    `kubectl`: how a person calls it for the same API server, for errors that say what to do.
    """

    shared = True

    def __init__(self, client: KubernetesClient, namespace: str, *, kubectl: str = "kubectl") -> None:
        self._client, self._namespace, self._kubectl = client, namespace, kubectl

    def names(self) -> list[str]:
        try:
            return sorted(meta_of(i).name for i in self._client.list(MODEL_ROLLOUT, self._namespace).items)
        except NotFound as e:
            raise StateError("the API server doesn't know ModelRollout: install Hafnium's CRDs (kustomize/crds)") from e

    def _get(self, name: str) -> Json:
        try:
            return self._client.get(MODEL_ROLLOUT, self._namespace, name)
        except NotFound as e:
            known = ", ".join(self.names()) or "none"
            raise UnknownRollout(f"no ModelRollout {name!r} in namespace {self._namespace}; there are: {known}") from e

    def rollout(self, name: str) -> ModelRollout:
        return parse_rollout(self._get(name), f"ModelRollout {self._namespace}/{name}")

    def wanted(self, name: str) -> str:
        digest = digest_at(self._get(name), "spec", "model", "digest")
        if digest is None:
            raise StateError(f"ModelRollout {self._namespace}/{name}: spec.model.digest is no digest")
        return digest

    def status(self, name: str) -> RolloutStatus:
        return status_of(self._get(name))

    def known_status(self, name: str) -> tuple[RolloutStatus, tuple[str, ...]]:
        item = self._get(name)
        try:
            return known_status(item.get("status") or {})
        except ValidationError:
            return status_of(item), ()  # which says what it can't read

    def standing(self, name: str) -> Standing:
        return standing_of(self._get(name).get("status"))

    def asked(self, name: str, status: RolloutStatus) -> bool:
        wish = dig(self._get(name), "spec", "action", "id")
        return wish is not None and wish not in status.handled_actions

    def ask(self, name: str, action: UserAction) -> str:
        item = self._get(name)
        waiting = _waiting(item)
        # All fields, so that none of an earlier wish is left. A merge and no apply: with older CRDs a field that they don't know is
        # dropped, where an apply would refuse the whole, and an abort must not fail for a field that only says who asked.
        change: Json = {"spec": {"action": action.model_dump(mode="json", by_alias=True)}}
        if action.type != "Abort":
            if waiting:
                raise StateError(
                    f"{waiting}, and the operator hasn't acted on it yet: nothing was asked, since {action.type} would take its place. "
                    f"Wait for it (`status`), abort, or take it out: {self._patch(name, {'action': None})}")
            change["metadata"] = {"resourceVersion": meta_of(item).resource_version}
        try:
            self._client.merge(MODEL_ROLLOUT, self._namespace, name, change, manager=MANAGER)
        except Conflict as e:
            item = self._get(name)
            if dig(item, "spec", "action", "id") == action.id:
                return ""  # an answer was lost, and the client sent it twice
            theirs = f" ({now})" if (now := _waiting(item)) else ""
            raise StateError(
                f"ModelRollout {self._namespace}/{name} was written in between{theirs}: nothing was asked. Look at `status`, then ask "
                f"again ({e})") from e
        return waiting

    def by_hand(self, name: str, wish: Mapping[str, str]) -> str:
        return self._patch(name, {"action": dict(wish)})

    def _patch(self, name: str, spec: Json) -> str:
        return f"{self._kubectl} patch modelrollout {name} -n {self._namespace} --type merge -p {shlex.quote(json.dumps({'spec': spec}))}"

    def approve(self, approval: ModelApproval) -> None:
        name = f"{approval.metadata.name[:200]}-{approval.spec.stage}-{secrets.token_hex(3)}"
        spec = approval.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        self._client.create(MODEL_APPROVAL, {"metadata": {"name": name, "namespace": self._namespace}, "spec": spec}, manager=MANAGER)

    def approvals(self) -> list[Approval]:
        out: list[Approval] = []
        for item in self._client.list(MODEL_APPROVAL, self._namespace).items:
            created = dig(item, "metadata", "creationTimestamp")
            when = datetime.fromisoformat(created) if isinstance(created, str) else None
            out += [Approval(a.model_digest, a.stage, a.approver, when) for a in approvals_seen([item])]
        return out

    def evidence(self) -> tuple[EvidenceSpec, ...]:
        return evidence_seen(self._client.list(MODEL_EVIDENCE, self._namespace).items)[0]

    def record(self, name: str) -> Path | None:
        return None

    def whoami(self) -> str:
        """The name that the API server knows the caller by."""
        found = dig(self._client.create(_SELF, {"metadata": {}}, manager=MANAGER), "status", "userInfo", "username")
        return found if isinstance(found, str) else ""


def _waiting(item: Json) -> str:
    """The wish that the operator hasn't acted on yet: who asked for what, and when. Empty when there is none."""
    action = dig(item, "spec", "action")
    if action is None or dig(action, "id") in standing_of(item.get("status")).handled_actions:
        return ""
    who, digest, why = dig(action, "requestedBy") or "somebody", str(dig(action, "candidateDigest")), dig(action, "reason")
    written = [str(m.get("time")) for m in rows(item, "metadata", "managedFields") if dig(m, "fieldsV1", "f:spec", "f:action") is not None]
    when = f" at {max(written)}" if written else ""
    return f"{who} asked for {dig(action, 'type')} of {digest[:19]}{when}{f' ({why})' if why else ''}"
