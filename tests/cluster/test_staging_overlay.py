"""overlays/staging on a real cluster: as prod, but for KEDA, which a cluster of tests hasn't got, and the days that its steps take.

Bundles and the inference log are in a bucket (an S3 server of this machine), features in the overlay's Redis, the namespace asks for an
approval, and the operator compares the scores of copies by what both models wrote into the bucket.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import yaml
from hafnium_buckets import NAME as BUCKET
from hafnium_buckets import Bucket, bucket_with, fill_redis, need_images, overlay_with, with_secrets
from hafnium_install import Installed, for_this_cluster, installed
from hafnium_kubectl import JSON, ROOT, Kubectl, role_binding
from hafnium_operator import MIRRORING_GATEWAY, PROMETHEUS, host, release, until
from hafnium_progress import stable_is, wait_for
from hafnium_relay import relayed
from hafnium_scores import ScoreLoad, score_requests
from pyarrow import fs

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]
BRIDGE = os.environ.get("HAFNIUM_TEST_BRIDGE", "10.88.0.1")
"""Where pods reach this machine."""
NAME = "unified-risk"
VALIDATOR = "vera@example.com"
STEP_S = 500.0
"""For one thing to come about. A limit and no measurement."""


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(ROOT / "examples/unified-risk/contract.yaml")


@pytest.fixture(scope="module")
def bundles(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """v2 differs from v1 a little; v3 thinks much worse of everybody."""
    folder = tmp_path_factory.mktemp("bundles")
    return {version: make_bundle(folder / version, contract, version=version, bias=bias)
            for version, bias in (("v1", -2.0), ("v2", -2.05), ("v3", 0.5))}


@pytest.fixture(scope="module")
def bucket(types: Kubectl, bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    need_images(types)
    with bucket_with(bundles, tmp_path_factory.mktemp("s3"), BRIDGE) as made:
        yield made


@pytest.fixture(scope="module")
def place(
    types: Kubectl, bucket: Bucket, contract: ModelContract, tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Installed, JSON]]:
    """The overlay, with Redis filled and somebody who may approve, and its ModelRollout, which the test applies itself."""
    suffix = secrets.token_hex(3)
    system, models = f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk"
    with relayed(PROMETHEUS, BRIDGE) as prometheus:
        settings = {"PROMETHEUS_URL": prometheus, "GATEWAY": "kserve/envoy", "SCRAPE_INTERVAL_S": "5"}
        documents = for_this_cluster(overlay_with("staging", bucket), system, models, settings)
        (rollout,) = [d for d in documents if d["kind"] == "ModelRollout"]
        # MLflow's server has tests of its own (test_jobs), and the node is small
        rest = [d for d in documents if d is not rollout and (d["kind"], d["metadata"]["name"]) != ("Deployment", "hafnium-mlflow")]
        with installed(types, suffix, with_secrets(rest, system, models, bucket), ("features",)) as made:
            try:
                for role in ("approver", "approve-validation"):
                    made.models("apply", "-f", "-", given=role_binding(f"vera-{role}", f"hafnium-{role}-{system}", VALIDATOR))
                fill_redis(made, contract, tmp_path_factory.mktemp("feast") / "features")
                yield made, rollout
            finally:
                release(made.models)


def asked_for(rollout: JSON, bundle: Bundle) -> JSON:
    """The overlay's ModelRollout for one of the test's bundles, in minutes instead of hours, on one node."""
    item = yaml.safe_load(yaml.safe_dump(rollout))
    spec = item["spec"]
    spec["model"] |= {"version": bundle.manifest.model_version, "digest": bundle.manifest.digest,
                      "storageUri": f"s3://{BUCKET}/bundles/{bundle.manifest.model_version}"}
    spec["strategy"] |= {"maxBlindDuration": "5m", "steps": [
        {"shadow": True, "minSamples": 200, "deadline": "40m"}, {"weight": 25, "minDwell": "5s", "minSamples": 50, "deadline": "40m"},
        {"weight": 100, "minDwell": "5s", "deadline": "40m"}]}
    spec["gates"] = [
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.1, "alpha": 0.1}},
        {"name": "scores", "role": "Quality", "scores": {}, "compare": {"margin": 0.05, "alpha": 0.1}},
    ]
    for component in spec["service"].values():
        component["minReplicas"] = 1
    spec["service"]["transformer"]["containers"][0]["args"].append("--log_flush_seconds=2")
    return item


def approve(kubectl: Kubectl, bundle: Bundle) -> None:
    kubectl.of(VALIDATOR)("create", "-f", "-", given={
        "apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelApproval", "metadata": {"name": f"{bundle.manifest.model_version}-validation"},
        "spec": {"modelDigest": bundle.manifest.digest, "stage": "validation", "approver": VALIDATOR}})


def test_a_model_from_a_bucket_goes_live_when_it_is_approved_and_its_copies_score_alike(
    place: tuple[Installed, JSON], bundles: dict[str, Bundle], contract: ModelContract, bucket: Bucket,
) -> None:
    made, rollout = place
    kubectl = made.models
    requests = score_requests(contract)
    until(lambda: made.system.read("deployment", "hafnium-rollout-operator").get("status", {}).get("availableReplicas") == 2,
          "two operators, with the volume that both mount", STEP_S)
    bare = asked_for(rollout, bundles["v1"])
    del bare["spec"]["approvals"]
    assert "required-approvals" in kubectl.refused("apply", "-f", "-", given=bare)
    kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v1"]))
    wait_for(kubectl, NAME, lambda s: "approv" in (s.get("message") or ""), "v1 waits for somebody who approves it", STEP_S)
    approve(kubectl, bundles["v1"])
    wait_for(kubectl, NAME, stable_is(bundles["v1"]), "v1 is live", STEP_S)
    address = host(NAME, kubectl.namespace)
    with ScoreLoad(MIRRORING_GATEWAY, address, requests[:1], rate=5) as first:
        until(lambda: first.versions["v1"] > 3, "v1 answers at the gateway", 90)

    with ScoreLoad(MIRRORING_GATEWAY, address, requests, rate=30) as load:
        approve(kubectl, bundles["v2"])
        kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v2"]))
        live = wait_for(kubectl, NAME, stable_is(bundles["v2"]), "v2 is live", STEP_S)
        assert "scores" in {g["name"] for p in live["history"] for g in p.get("gates", []) if g["verdict"] == "Pass"}
        assert set(load.next(100)) == {"v2"}

        approve(kubectl, bundles["v3"])
        kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v3"]))
        back = wait_for(kubectl, NAME, lambda s: s.get("phase") == "RolledBack", "v3 is rejected", STEP_S)
        assert back["rejectedDigests"] == [bundles["v3"].manifest.digest]
        assert {g["name"]: g["verdict"] for g in back["gates"]}["scores"] == "Fail"
        assert set(load.next(100)) == {"v2"}
        assert load.versions["v3"] == 0, "it got copies alone"
        assert load.lost == []
        assert load.refused == 0

    written = bucket.files.get_file_info(fs.FileSelector(f"{BUCKET}/inference-log", recursive=True))
    assert any(f.path.endswith(".parquet") for f in written)
    for pod in kubectl.read("pods", "-l", "component=predictor")["items"]:
        (initializer,) = pod["spec"]["initContainers"]
        assert initializer["securityContext"]["capabilities"] == {"drop": ["ALL"]}
