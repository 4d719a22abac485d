"""The kinds that are read and written, where the API server keeps them, and in whose name the operator writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

FIELD_MANAGER = "hafnium-rollout"
"""Owner of the fields that the operator applies. Commands of people use another."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of object in one version of its group."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Path of the group's version: lists its resources."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Path of the list (no name; of all namespaces without one), of an object, or of its subresource."""
        middle = f"/namespaces/{quote(namespace, safe='')}" if self.namespaced and namespace else ""
        end = f"/{quote(name, safe='')}" if name else ""
        return f"{self.root}{middle}/{self.plural}{end}{'/' + subresource if subresource else ''}"


MODEL_ROLLOUT = Kind("hafnium.dev", "v1alpha1", "modelrollouts", "ModelRollout")
MODEL_EVIDENCE = Kind("hafnium.dev", "v1alpha1", "modelevidences", "ModelEvidence")
MODEL_APPROVAL = Kind("hafnium.dev", "v1alpha1", "modelapprovals", "ModelApproval")
INFERENCE_SERVICE = Kind("serving.kserve.io", "v1beta1", "inferenceservices", "InferenceService")
HTTP_ROUTE = Kind("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute")
GATEWAY = Kind("gateway.networking.k8s.io", "v1", "gateways", "Gateway")
GATEWAY_CLASS = Kind("gateway.networking.k8s.io", "v1", "gatewayclasses", "GatewayClass", namespaced=False)
REVISION = Kind("serving.knative.dev", "v1", "revisions", "Revision")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
EVENT = Kind("", "v1", "events", "Event")
POD = Kind("", "v1", "pods", "Pod")
SERVICE = Kind("", "v1", "services", "Service")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
NAMESPACE = Kind("", "v1", "namespaces", "Namespace", namespaced=False)
CUSTOM_RESOURCE_DEFINITION = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
