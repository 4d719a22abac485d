"""overlays/knative on a real cluster: bundles, features and inference log where production has them, and KServe's own canary.

Bundles and log are in a bucket (an S3 server of this machine), features in the overlay's Redis, and `canaryTrafficPercent` moves traffic.
v2 gets everything by its gates; v3's scores are far from v2's, which the gate over the log finds with a quarter of the traffic.
"""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import yaml
from hafnium_buckets import NAME as BUCKET
from hafnium_buckets import Bucket, bucket_with, fill_redis, need_images, overlay_with, with_secrets
from hafnium_install import Installed, for_this_cluster, installed
from hafnium_kubectl import JSON, ROOT, Kubectl
from hafnium_operator import PROMETHEUS, release, until
from hafnium_progress import stable_is, wait_for
from hafnium_relay import relayed
from hafnium_scores import ScoreLoad, score_requests
from pyarrow import fs

from hafnium_contract.bundle import Bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import make_bundle

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2400)]
DOOR = os.environ.get("HAFNIUM_TEST_KNATIVE", "http://127.0.0.1:8020")
"""Where Kourier answers."""
BRIDGE = os.environ.get("HAFNIUM_TEST_BRIDGE", "10.88.0.1")
"""Where pods reach this machine."""
NAME = "unified-risk"
STEP_S = 600.0
"""For one thing to come about. A limit and no measurement."""
FEATURES = {"kubernetes.podspec-persistent-volume-claim": "enabled"}
"""What docs/kubernetes.md asks of Knative's config-features."""


@pytest.fixture(scope="module")
def knative(types: Kubectl) -> Iterator[Kubectl]:
    """A cluster with Knative as our docs want it, and the images that this overlay needs beside ours."""
    if types.run("get", "crd", "revisions.serving.knative.dev").returncode != 0:
        pytest.skip("NOT TESTED: the cluster has no Knative Serving")
    try:
        urllib.request.urlopen(DOOR, timeout=5).close()  # noqa: S310 - an address of the test's own settings
    except urllib.error.HTTPError:
        pass
    except OSError as e:
        pytest.skip(f"NOT TESTED: Kourier does not answer at {DOOR}: {e}")
    need_images(types)
    place = ("-n", "knative-serving", "configmap", "config-features")
    before = json.loads(types("get", *place, "-o", "json")).get("data", {})
    types("patch", *place, "--type=merge", "-p", json.dumps({"data": FEATURES}))
    try:
        yield types
    finally:
        types("patch", *place, "--type=merge", "-p", json.dumps({"data": {k: before.get(k) for k in FEATURES}}))


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    return load_contract(ROOT / "examples/unified-risk/contract.yaml")


@pytest.fixture(scope="module")
def bundles(contract: ModelContract, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """v1 and v2 differ a little, v3 thinks much worse of everybody."""
    folder = tmp_path_factory.mktemp("bundles")
    return {version: make_bundle(folder / version, contract, version=version, bias=bias)
            for version, bias in (("v1", -2.0), ("v2", -2.05), ("v3", 0.5))}


@pytest.fixture(scope="module")
def bucket(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with bucket_with(bundles, tmp_path_factory.mktemp("s3"), BRIDGE) as made:
        yield made


@pytest.fixture(scope="module")
def place(
    knative: Kubectl, bucket: Bucket, contract: ModelContract, tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Installed, JSON]]:
    """The overlay, with Redis filled, and its ModelRollout, which the test applies itself."""
    suffix = secrets.token_hex(3)
    system, models = f"hafnium-test-{suffix}-system", f"hafnium-test-{suffix}-risk"
    with relayed(PROMETHEUS, BRIDGE) as prometheus:
        settings = {"PROMETHEUS_URL": prometheus, "SCRAPE_INTERVAL_S": "5"}
        documents = for_this_cluster(overlay_with("knative", bucket), system, models, settings)
        (rollout,) = [d for d in documents if d["kind"] == "ModelRollout"]
        applied = with_secrets([d for d in documents if d is not rollout], system, models, bucket)
        with installed(knative, suffix, applied, ("features",)) as made:
            try:
                fill_redis(made, contract, tmp_path_factory.mktemp("feast") / "features")
                yield made, rollout
            finally:
                release(made.models)


def asked_for(rollout: JSON, bundle: Bundle) -> JSON:
    """The overlay's ModelRollout for one of the test's bundles, in minutes instead of days.

    Its drift gate isn't among them: the CronJob judges whole hours. What the job makes of a log as this canary writes it, every row marked
    `stable`, is in tests/monitoring/test_drift.py.
    """
    item = yaml.safe_load(yaml.safe_dump(rollout))
    spec = item["spec"]
    spec["model"] |= {"version": bundle.manifest.model_version, "digest": bundle.manifest.digest,
                      "storageUri": f"s3://{BUCKET}/bundles/{bundle.manifest.model_version}"}
    weights = {5: 30, 25: 100, 100: 0}
    spec["strategy"] |= {"maxBlindDuration": "5m", "steps": [
        {"weight": w, "minDwell": "5s", "minSamples": n or 1, "deadline": "40m"} for w, n in weights.items()]}
    spec["gates"] = [
        {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.1, "alpha": 0.1}},
        {"name": "scores", "role": "Quality", "scores": {"unpaired": True}, "compare": {"margin": 0.2, "harmless": 0.1, "alpha": 0.1}},
    ]
    spec["service"]["transformer"]["containers"][0]["args"].append("--log_flush_seconds=2")
    return item


def test_a_canary_by_kserve_with_bundles_features_and_log_where_production_has_them(
    place: tuple[Installed, JSON], bundles: dict[str, Bundle], contract: ModelContract, bucket: Bucket,
) -> None:
    made, rollout = place
    kubectl = made.models
    requests = score_requests(contract)
    kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v1"]))
    wait_for(kubectl, NAME, stable_is(bundles["v1"]), "v1 is live", STEP_S)
    host = f"{NAME}-transformer.{kubectl.namespace}.example.com"
    with ScoreLoad(DOOR, host, requests[:1], rate=5) as first:
        until(lambda: first.versions["v1"] > 3, "v1 answers at Kourier", 120)
    headers = {"Host": host, "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{DOOR}/v1/score", json.dumps(requests[0]).encode(), headers)  # noqa: S310 - as above
    with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310 - an address of the test's own settings
        assert not json.load(answer)["degraded"], "Redis knows this customer"

    with ScoreLoad(DOOR, host, requests, rate=40) as load:
        kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v2"]))
        wait_for(kubectl, NAME, stable_is(bundles["v2"]), "v2 is live", STEP_S)
        assert set(load.next(100)) == {"v2"}

        kubectl("apply", "-f", "-", given=asked_for(rollout, bundles["v3"]))
        back = wait_for(kubectl, NAME, lambda s: s.get("phase") == "RolledBack", "v3 is rejected", STEP_S)
        assert back["rejectedDigests"] == [bundles["v3"].manifest.digest]
        assert {g["name"]: g["verdict"] for g in back["gates"]}["scores"] == "Fail"
        until(lambda: set(load.next(100)) == {"v2"}, "all traffic is back", 120)
        assert load.versions["v3"] > 0, "it had its share"
        assert load.lost == []
        assert load.refused == 0

    percents = [c.get("canaryTrafficPercent") for c in kubectl.read("inferenceservice", NAME)["spec"].values()]
    assert percents == [None, None]
    written = bucket.files.get_file_info(fs.FileSelector(f"{BUCKET}/inference-log", recursive=True))
    assert any(f.path.endswith(".parquet") for f in written)
    kubectl("create", "job", "drift", "--from=cronjob/hafnium-drift")
    until(lambda: kubectl.read("job", "drift")["status"].get("succeeded"), "the drift job reads the bucket", 300)
