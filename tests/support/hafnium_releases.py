"""Another release of Hafnium than this checkout's: the one before, out of git, and one that may come, with a further version of a type."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hafnium_kubectl import JSON, ROOT, Kubectl
from hafnium_operator import environment_of, until

CRD = "modelrollouts.hafnium.dev"
CRDS = tuple(f"crd/{kind}.hafnium.dev" for kind in ("modelrollouts", "modelevidences", "modelapprovals"))
SPOKEN = "v1alpha1"
"""The version that operators speak."""
SETTLE_S = 5.0
"""Until the API server writes in another storage version: nothing shows it, and objects that it wrote before would be lost with theirs."""


# --- the release before ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """Its CRDs, and a tree with its operator."""

    name: str
    crds: list[JSON]
    source: Path


def git(*arguments: str) -> bytes | None:
    """What git says; None when it can't."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else None


def revision_before() -> str:
    """HAFNIUM_UPGRADE_FROM; else the newest release tag before HEAD; else the commit before the CRDs got their present form.

    Without any of them (a checkout without history) the test is skipped.
    """
    named = os.environ.get("HAFNIUM_UPGRADE_FROM")
    if named:
        assert git("rev-parse", "--verify", f"{named}^{{commit}}") is not None, f"HAFNIUM_UPGRADE_FROM={named}: git knows no such commit"
        return named
    tag = git("describe", "--tags", "--abbrev=0", "--match=v[0-9]*", "HEAD~1")
    if tag:
        return tag.decode().strip()
    changed = (git("log", "-1", "--format=%H", "--", "kustomize/crds") or b"").decode().strip()
    before = git("rev-parse", "--verify", f"{changed}^") if changed else None
    if before is None:
        pytest.skip("NOT TESTED: no release before this one is in this checkout's history; HAFNIUM_UPGRADE_FROM names a tag or commit")
    return before.decode().strip()


def release_before(folder: Path) -> Release:
    """Unpacks it below `folder`."""
    revision = revision_before()
    packed = git("archive", revision, "contract", "rollouts", "kustomize/crds")
    assert packed is not None, f"{revision}: no contract/, rollouts/ and kustomize/crds/ in it"
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(folder, filter="data")
    code = "import hafnium_contract, hafnium_rollout; print(hafnium_contract.__file__); print(hafnium_rollout.__file__)"
    places = subprocess.run([sys.executable, "-c", code], env=environment_of(folder), capture_output=True, text=True, check=True).stdout
    assert all(Path(p).is_relative_to(folder) for p in places.split()), f"not the release before is imported: {places}"
    files = sorted((folder / "kustomize/crds").glob("hafnium.dev_*.yaml"))
    crds = [d for file in files for d in yaml.safe_load_all(file.read_text(encoding="utf-8")) if d]
    assert len(crds) == len(CRDS), f"{revision}: CRDs in {[file.name for file in files]}"
    return Release(revision, crds, folder)


# --- types ----------------------------------------------------------------------------------------------------------------------


def present() -> list[JSON]:
    """This checkout's CRDs."""
    return [d for d in yaml.safe_load_all((ROOT / "manifests/crds.yaml").read_text(encoding="utf-8")) if d]


def install(kubectl: Kubectl, crds: list[JSON]) -> None:
    """Until the API server serves just those, and kubectl, which remembers versions for hours, knows it."""
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", given=crds)
    kubectl.established(*CRDS)
    served = {v["name"] for crd in crds for v in crd["spec"]["versions"]}
    until(lambda: {v["version"] for v in json.loads(kubectl("get", "--raw", "/apis/hafnium.dev"))["versions"]} == served,
          f"{', '.join(served)} served", 60)
    time.sleep(SETTLE_S)
    kubectl("api-resources", "--api-group=hafnium.dev")


def crd_of(crds: list[JSON], name: str = CRD) -> JSON:
    (found,) = [copy.deepcopy(d) for d in crds if d["metadata"]["name"] == name]
    return found


def schema(version: JSON) -> JSON:
    return version["schema"]["openAPIV3Schema"]["properties"]


def with_version(crd: JSON, name: str, stored: str) -> JSON:
    """The same type in a further version, with the same schema. `stored`: the version in which objects are kept."""
    out = copy.deepcopy(crd)
    (spoken,) = out["spec"]["versions"]
    out["spec"]["versions"] = [spoken, {**copy.deepcopy(spoken), "name": name}]
    for version in out["spec"]["versions"]:
        version["storage"] = version["name"] == stored
    return out


def stored_versions(kubectl: Kubectl) -> list[str]:
    return kubectl.read("crd", CRD)["status"]["storedVersions"]


# --- what docs/kubernetes.md says to do -------------------------------------------------------------------------------------------


def documented(begins: str) -> str:
    """The shell block of docs/kubernetes.md whose first line begins so."""
    blocks = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8").split("```sh\n")[1:]
    (found,) = [b.split("```")[0] for b in blocks if b.startswith(begins)]
    return found


def store_anew(version: str) -> None:
    """Writes all objects in the version that is the storage version now, and forgets the others, by the commands of the docs."""
    text = documented("# objects anew").replace("v1alpha2", version)

    def done() -> bool:  # again when an object was deleted meanwhile, as the docs say
        return subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, timeout=120, check=False).returncode == 0
    until(done, "all objects anew", 300)


def further_versions(kubectl: Kubectl) -> list[str]:
    """Those that a test made and a killed one left behind."""
    found = kubectl("get", "crd", CRD, "--ignore-not-found", "-o", "jsonpath={.spec.versions[*].name}").split()
    return [v for v in found if v != SPOKEN]


def as_before(kubectl: Kubectl) -> None:
    """The types of this checkout again, wherever a test left them."""
    for further in further_versions(kubectl):
        install(kubectl, [*(d for d in present() if d["metadata"]["name"] != CRD), with_version(crd_of(present()), further, SPOKEN)])
        store_anew(SPOKEN)
    install(kubectl, present())
    kubectl("get", "modelrollouts", "-A")  # an object that is still kept in a version that is gone would be an error
