"""A real Kubernetes: the one that KUBECONFIG names. `make test-cluster` brings one up where it can."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import ROOT, Kubectl
from hafnium_operator import GATEWAY, IMAGE, PROMETHEUS, Door, Load, OperatorProcess, host, release
from hafnium_releases import as_before, further_versions

Start = Callable[..., OperatorProcess]


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
    if further_versions(cluster):
        as_before(cluster)
    cluster("apply", "--server-side", "--force-conflicts", "-k", "kustomize/crds")
    cluster.established("crd/modelrollouts.hafnium.dev", "crd/modelevidences.hafnium.dev", "crd/modelapprovals.hafnium.dev")
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


# --- operators ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def surroundings(model_image: None) -> None:
    """Prometheus, the gateway and the image; what isn't there is said."""
    for what, url in (("Prometheus", f"{PROMETHEUS}/-/ready"), ("the gateway", GATEWAY)):
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - an address of the test's own settings
        except urllib.error.HTTPError:
            continue
        except OSError as e:
            pytest.skip(f"{what} does not answer at {url}: {e}")


@pytest.fixture(scope="session")
def model_image(cluster: Kubectl) -> None:
    """The image of the models that operators of the tests move; it is built where that can be done."""
    names = {n for node in cluster.read("nodes")["items"] for i in node["status"].get("images", []) for n in i.get("names") or []}
    if IMAGE in names:
        return
    tool = shutil.which("image") or str(ROOT.parent / "shared/cluster/image")
    if not Path(tool).is_file():
        pytest.skip(f"the cluster hasn't got the image {IMAGE}; build it from tests/cluster/image")
    subprocess.run([tool, IMAGE, str(ROOT / "tests/cluster/image")], check=True, timeout=900, capture_output=True)


@pytest.fixture(scope="module")
def left_behind(namespaced: Kubectl) -> Iterator[None]:
    """After the module nothing is left under way that would keep its namespace."""
    yield
    release(namespaced)


@pytest.fixture
def start(namespaced: Kubectl, tmp_path: Path) -> Iterator[Start]:
    """Starts operators; all of them end with the test."""
    with ExitStack() as stack:
        def made(name: str = "operator", **settings: Any) -> OperatorProcess:
            process = OperatorProcess(tmp_path, namespaced.namespace, name, **settings)
            stack.callback(process.stop)
            return process
        yield made


@pytest.fixture
def load(namespaced: Kubectl) -> Iterator[Callable[..., Load]]:
    """Starts load; all of it ends with the test."""
    with ExitStack() as stack:
        def made(name: str, gateway: str = GATEWAY, rate: float = 150.0) -> Load:
            found = Load(host(name, namespaced.namespace), gateway, rate)
            stack.callback(found.stop)
            return found
        yield made


@pytest.fixture
def prometheus() -> Iterator[Door]:
    """The real one, behind a door that a test may close."""
    door = Door(PROMETHEUS)
    yield door
    door.close()
