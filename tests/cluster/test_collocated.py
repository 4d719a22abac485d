"""components/collocated-transformer on a real cluster: one pod has both parts, and answers with what the store knows."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from hafnium_install import Installed, for_this_cluster, installed
from hafnium_kubectl import ROOT, Kubectl, kustomized
from hafnium_operator import until
from hafnium_servers import make_feature_repo

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_testing import make_bundle, synthetic_rows, synthetic_views

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
READY_S = 300.0
"""A limit and no measurement."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    contract = load_contract(ROOT / "examples/unified-risk/contract.yaml")
    return make_bundle(tmp_path_factory.mktemp("bundles") / "v1", contract, version="1", bias=-1.5)


@pytest.fixture(scope="module")
def place(types: Kubectl, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    suffix = secrets.token_hex(3)
    repo = tmp_path_factory.mktemp("files") / "repo"
    make_feature_repo(repo, bundle.contract, synthetic_views(bundle.contract, 1))
    documents = for_this_cluster(kustomized("tests/cluster/collocated"), f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk")
    with installed(types, suffix, documents, ("bundles", "features")) as made:
        made.desk.put(bundle.path, "bundles/v1")
        made.desk.put(repo, "features")
        # A pod that came before the files has found none
        made.models("delete", "pod", "-l", "serving.kserve.io/inferenceservice=unified-risk", "--wait=false")
        yield made


def test_one_pod_has_both_parts_and_answers_with_what_the_store_knows(place: Installed, bundle: Bundle) -> None:
    def ready() -> bool:
        conditions = place.models.read("isvc", "unified-risk").get("status", {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    try:
        until(ready, "the service is ready", READY_S, 1.0)
    except AssertionError as e:
        seen = place.models.run("get", "pods,isvc", "-o", "wide").stdout + place.models.run("get", "events").stdout[-3000:]
        raise AssertionError(f"{e}\n{seen}\n{place.models.read('isvc', 'unified-risk').get('status')}") from e
    names = {tuple(sorted(c["name"] for c in p["spec"]["containers"]))
             for p in place.models.read("pods", "-l", "serving.kserve.io/inferenceservice=unified-risk")["items"]}
    assert names == {("kserve-container", "transformer-container")}
    status, said = place.desk.ask("http://unified-risk-predictor/v1/score", synthetic_rows(bundle.contract, 1, 5)[0])
    assert status == 200
    assert said["model_version"] == "1"
    assert not said["degraded"]
