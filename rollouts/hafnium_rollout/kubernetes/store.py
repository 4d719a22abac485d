"""The commands' store on a cluster: ModelRollouts of one namespace through the API server, with the rights of who asks.

A wish is `spec.action`, merged in under a field manager of the commands' own: of the ModelRollout nothing else is touched,
whoever manages it, and who wished is in managedFields and in the audit log. An approval is a ModelApproval in the name that the
API server knows the caller by; its admission policies check that.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from pathlib import Path

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.errors import StateError, UnknownRollout
from hafnium_rollout.kubernetes.client import KubernetesClient
from hafnium_rollout.kubernetes.errors import NotFound
from hafnium_rollout.kubernetes.kinds import MODEL_APPROVAL, MODEL_EVIDENCE, MODEL_ROLLOUT, Json, Kind
from hafnium_rollout.kubernetes.objects_seen import approvals_seen, dig, evidence_seen, meta_of, status_of
from hafnium_rollout.objects import ModelApproval, ModelRollout, UserAction, parse_rollout
from hafnium_rollout.status import RolloutStatus
from hafnium_rollout.stores import Approval

MANAGER = "hafnium-command"
_SELF = Kind("authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", namespaced=False)


class KubernetesStore:
    """One namespace. Raises KubernetesError for what the API server refuses, with its words."""

    def __init__(self, client: KubernetesClient, namespace: str) -> None:
        self._client, self._namespace = client, namespace

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

    def status(self, name: str) -> RolloutStatus:
        return status_of(self._get(name))

    def asked(self, name: str, status: RolloutStatus) -> bool:
        wish = dig(self._get(name), "spec", "action", "id")
        return wish is not None and wish not in status.handled_actions

    def ask(self, name: str, action: UserAction) -> None:
        # All fields, so that none of an earlier wish is left. A merge and no apply: with older CRDs a field that they don't know is
        # dropped, where an apply would refuse the whole, and an abort must not fail for a field that only says who asked.
        wish = action.model_dump(mode="json", by_alias=True)
        self._client.merge(MODEL_ROLLOUT, self._namespace, name, {"spec": {"action": wish}}, manager=MANAGER)

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
