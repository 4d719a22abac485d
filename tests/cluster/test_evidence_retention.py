"""Old evidence on a real cluster: written down whole, removed, and what gates and retrainings may need stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_kubectl import Kubectl, sample
from hafnium_operator import OperatorProcess, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
NOW = datetime.now(UTC).replace(microsecond=0)
Start = Callable[..., OperatorProcess]
MODEL, FORMER = "sha256:" + "a" * 64, "sha256:" + "e" * 64


def evidence(hours_ago: int, digest: str, verdict: str = "Pass") -> dict[str, Any]:
    """As the hourly job wrote it then."""
    end = NOW - timedelta(hours=hours_ago)
    data = sample("modelevidence") | {"metadata": {"name": f"drift-{digest[7:15]}-{hours_ago:04d}"}}
    data["spec"] |= {
        "modelDigest": digest, "kind": "drift", "verdict": verdict, "windowStart": (end - timedelta(hours=1)).isoformat(),
        "windowEnd": end.isoformat(), "createdAt": end.isoformat()}
    return data


def names(kubectl: Kubectl) -> list[str]:
    return sorted(i["metadata"]["name"] for i in kubectl.read("modelevidences")["items"])


def test_a_years_evidence_comes_down_to_what_may_be_needed(namespaced: Kubectl, start: Start, tmp_path: Path) -> None:
    kubectl, data = namespaced, tmp_path / "data"
    rollout = sample("modelrollout") | {"metadata": {"name": "kept"}}
    rollout["spec"]["model"]["digest"] = MODEL
    rollout["spec"]["routing"] = {"gatewayRef": {"name": "there-is-none"}}  # it doesn't begin: this is about evidence alone
    written = [*(evidence(h, MODEL) for h in (1, *range(200, 8000, 200))), evidence(7999, MODEL, "Fail"), evidence(2, FORMER),
               evidence(40, FORMER, "Fail")]
    kubectl("create", "-f", "-", given=[rollout, *written])
    before = {i["metadata"]["name"]: i for i in kubectl.read("modelevidences")["items"]}
    assert len(before) == len(written) == 43
    operator = start("first", data_folder=data, evidence_kept=20, evidence_removals_max=5)
    newest = [f"drift-aaaaaaaa-{h:04d}" for h in (1, *range(200, 4000, 200))]
    until(lambda: len(names(kubectl)) <= 21, "what is kept is left")
    assert names(kubectl) == sorted([*newest, "drift-eeeeeeee-0002"])
    mine = f'{{namespace="{kubectl.namespace}"}}'
    until(lambda: f"modelrollout_evidence_removed_total{mine} 22.0" in operator.get("/metrics")[1], "the count")
    until(lambda: f"modelrollout_evidence_surplus{mine} 0.0" in operator.get("/metrics")[1], "none is left over")
    assert operator.events().count("EvidenceRemoved") == 22
    assert "EvidenceNotRemoved" not in operator.events()
    (file,) = (data / "evidence" / kubectl.namespace).glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted(x["metadata"]["name"] for x in lines) == sorted(set(before) - set(names(kubectl)))
    for line in lines:
        was = before[line["metadata"]["name"]]
        assert line["spec"] == was["spec"]
        assert line["metadata"]["uid"] == was["metadata"]["uid"]
    operator.stop()
    again = start("second", data_folder=data, evidence_kept=20)
    until(lambda: f"modelrollout_evidences{mine} 21.0" in again.get("/metrics")[1], "a turn of another leader")
    assert len(names(kubectl)) == 21
    kubectl("delete", "modelrollout", "kept")
