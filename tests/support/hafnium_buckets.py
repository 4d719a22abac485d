"""What the overlays for production need beside them, for clusters of tests: a bucket with bundles, the image of Redis, secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hafnium_install import Installed
from hafnium_kubectl import JSON, ROOT, Kubectl, kustomized
from hafnium_operator import until
from hafnium_relay import relayed
from hafnium_s3 import KEY, S3, SECRET
from hafnium_scores import customers
from hafnium_servers import make_feature_repo
from pyarrow import fs

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract

NAME = "hafnium-risk"
"""Of the bucket that the overlays name."""
PASSWORD = "not a secret: a test's"
REDIS_IMAGE = "localhost/hafnium-test-redis:1"
INITIALIZER = "kserve-storage-initializer"
"""Part of the name of KServe's image that fetches bundles."""
READY_S = 300.0


@dataclass(frozen=True)
class Bucket:
    """An S3 server of this machine, as pods reach it."""

    address: str
    """HOST:PORT"""

    @property
    def log(self) -> str:
        return f"s3://{NAME}/inference-log?endpoint_override={self.address}&scheme=http&region=us-east-1"

    @property
    def files(self) -> fs.S3FileSystem:
        return _files(self.address)


def _files(address: str) -> fs.S3FileSystem:
    return fs.S3FileSystem(access_key=KEY, secret_key=SECRET, endpoint_override=address, scheme="http", region="us-east-1",
                           allow_bucket_creation=True)


@contextmanager
def bucket_with(bundles: Mapping[str, Bundle], folder: Path, bridge: str) -> Generator[Bucket]:
    """`bundles`: by what comes after bundles/ in their address."""
    with S3(folder) as s3, relayed(f"http://127.0.0.1:{s3.port}", bridge) as url:
        files = _files(f"127.0.0.1:{s3.port}")
        files.create_dir(NAME)
        for place, bundle in bundles.items():
            fs.copy_files(str(bundle.path), f"{NAME}/bundles/{place}", fs.LocalFileSystem(), files)
        yield Bucket(urlsplit(url).netloc)


def need_images(kubectl: Kubectl) -> None:
    """Builds Redis' image beside the cluster of the repository's neighbour; what else is missing skips the test."""
    if REDIS_IMAGE not in _images(kubectl):
        tool, folder = shutil.which("image") or str(ROOT.parent / "shared/cluster/image"), "tests/cluster/redis"
        if not Path(tool).is_file():
            pytest.skip(f"NOT TESTED: the nodes haven't got {REDIS_IMAGE}; build it from {folder}")
        subprocess.run([tool, REDIS_IMAGE, str(ROOT / folder)], check=True, timeout=600, capture_output=True)
    if not any(INITIALIZER in name for name in _images(kubectl)):
        pytest.skip(f"NOT TESTED: the nodes haven't got KServe's storage initializer ({INITIALIZER})")


def _images(kubectl: Kubectl) -> set[str]:
    return {n for node in kubectl.read("nodes")["items"] for i in node["status"].get("images", []) for n in i.get("names") or []}


def overlay_with(name: str, bucket: Bucket) -> list[JSON]:
    """An overlay with this bucket and Redis' image. Objects for Prometheus' operator aren't there: a cluster of tests hasn't got it."""
    patch = yaml.safe_dump([{"op": "replace", "path": "/data/inference-log", "value": bucket.log}])
    with TemporaryDirectory() as folder:  # as docs/kubernetes.md has users do it
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [os.path.relpath(ROOT / "kustomize/overlays" / name, Path(folder).resolve())],
            "patches": [{"target": {"kind": "ConfigMap", "name": "hafnium-buckets"}, "patch": patch}]}))
        text = yaml.safe_dump_all(kustomized(folder)).replace("redis:7.2.7", REDIS_IMAGE)
    assert text.count(f"s3://{NAME}/inference-log") == text.count(bucket.log) > 0
    return [d for d in yaml.safe_load_all(text) if not d["apiVersion"].startswith("monitoring.coreos.com/")]


def with_secrets(documents: list[JSON], system: str, models: str, bucket: Bucket) -> list[JSON]:
    """The documents, and what docs/kubernetes.md has users make beside them, in an order that can be applied."""
    account = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    place = (("endpoint", bucket.address), ("usehttps", "0"), ("region", "us-east-1"))
    made: list[dict[str, Any]] = [
        {"metadata": {"name": "hafnium-s3", "namespace": n, "annotations": {f"serving.kserve.io/s3-{k}": v for k, v in place}},
         "stringData": account} for n in (system, models)]
    made.append({"metadata": {"name": "hafnium-redis", "namespace": models}, "stringData": {"password": PASSWORD}})
    for d in documents:
        if (d["kind"], d["metadata"]["name"]) == ("ServiceAccount", "hafnium-models"):
            d["secrets"] = [{"name": "hafnium-s3"}]
    namespaces = [d for d in documents if d["kind"] == "Namespace"]
    return [*namespaces, *({"apiVersion": "v1", "kind": "Secret", **m} for m in made), *(d for d in documents if d["kind"] != "Namespace")]


def fill_redis(made: Installed, contract: ModelContract, folder: Path) -> None:
    """Customers into the overlay's Redis, and Feast's repository, which names it by a variable, onto the volume `features`."""
    until(lambda: made.models.read("statefulset", "redis")["status"].get("readyReplicas") == 1, "Redis is ready", READY_S)
    store = f"{made.models.read('service', 'redis')['spec']['clusterIP']}:6379,password={PASSWORD}"
    make_feature_repo(folder, contract, customers(contract), redis=store)
    settings = folder / "feature_store.yaml"
    settings.write_text(settings.read_text().replace(store, "${HAFNIUM_REDIS}"))
    made.desk.put(folder, "features")
