"""A real Kubernetes: the one that KUBECONFIG names. `make test-cluster` brings one up where it can."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hafnium_kubectl import Kubectl


@pytest.fixture(scope="session")
def cluster() -> Kubectl:
    """An admin's kubectl. Without a cluster the test is skipped; with one that doesn't answer it fails."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no cluster: set KUBECONFIG to one for tests, or run `make test-cluster`")
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on the PATH")
    kubectl = Kubectl()
    done = kubectl.run("get", "--raw", "/readyz", "--request-timeout=10s")
    if done.returncode != 0:
        pytest.fail(f"KUBECONFIG={os.environ['KUBECONFIG']}: the cluster doesn't answer: {done.stderr}")
    return kubectl


@pytest.fixture(scope="session")
def types(cluster: Kubectl) -> Kubectl:
    """The cluster with this version's CRDs. They stay: others may use them, and deleting one deletes all of its objects."""
    cluster("apply", "--server-side", "--force-conflicts", "-k", "kustomize/crds")
    crds = ("crd/modelrollouts.hafnium.dev", "crd/modelevidences.hafnium.dev", "crd/modelapprovals.hafnium.dev")
    cluster("wait", "--for=condition=Established", *crds, "--timeout=30s")
    return cluster


@pytest.fixture(scope="module")
def namespaced(types: Kubectl) -> Iterator[Kubectl]:
    """A namespace of the test module's own, deleted afterwards."""
    name = f"hafnium-test-{secrets.token_hex(3)}"
    types("create", "namespace", name)
    try:
        yield replace(types, namespace=name)
    finally:
        types("delete", "namespace", name, "--wait=false")
