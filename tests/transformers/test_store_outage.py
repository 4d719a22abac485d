"""The one Redis of all pods goes away: pods that are ready stay so and answer by the contract's policies; one that starts waits for it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hafnium_redis import Redis
from hafnium_servers import Server, chain_of, make_feature_repo, predictor, transformer, wait_until
from hafnium_steady_load import SteadyLoad

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import FromView, ModelContract
from hafnium_testing import make_bundle, synthetic_rows, synthetic_views
from hafnium_transformer import gate

pytestmark = pytest.mark.slow
SCORE, READY = "/v1/score", "/health/ready"
PATIENT = ["--deadline_ms", "20000", "--lookup_timeout_ms", "10000"]
KEPT = ["--appendonly", "yes", "--appendfsync", "everysec"]
"""As kustomize/components/redis has it: what was answered is in the file, also after a SIGKILL."""
FAILURES = "feature_lookup_failures_total"


def failures(front: Server, kind: str) -> float:
    lines = front.get("/metrics").body.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{FAILURES}{{") and f'type="{kind}"' in line)


def stays_ready(front: Server) -> None:
    """Asked for as long as an answer is kept, and again after that: the one that counts was made just now."""
    until = time.monotonic() + 2.0 * gate._READY_KEPT_S  # pyright: ignore[reportPrivateUsage]
    while time.monotonic() < until:
        assert front.get(READY).status == 200
        time.sleep(0.05)


def test_answers_go_on_degraded_while_redis_is_gone_and_no_pod_becomes_unready(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    rows = synthetic_rows(contract, 20, seed=0)
    looked_up = [f.name for f in contract.features if isinstance(f.source, FromView)]
    bodies = [json.dumps(row).encode() for row in rows]
    requests = [b"POST /v1/score HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (len(b), b) for b in bodies]
    with Redis(tmp_path, *KEPT) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        with chain_of(bundle, tmp_path, tmp_path / "repo", PATIENT) as (_, front):
            assert front.process is not None
            began_as = front.process.pid
            before = [front.post(SCORE, row).json for row in rows]
            assert not any(answer["degraded"] for answer in before)
            with SteadyLoad(front.port, requests, clients=4) as load, \
                    SteadyLoad(front.port, [b"GET /health/ready HTTP/1.1\r\nhost: h\r\n\r\n"], clients=1) as probes:
                load.wait_for(20)
                redis.kill()
                without = [front.post(SCORE, row).json for row in rows]
                load.wait_for(20)
                stays_ready(front)
                wait_until(lambda: failures(front, "unavailable") > 0 and failures(front, "not_asked") > 0)
                batch = front.post("/v1/score/batch", {"requests": rows * 3}).json["results"]
                again = [front.post(SCORE, row).json for row in rows]
                with redis:
                    wait_until(lambda: [front.post(SCORE, row).json for row in rows] == before)
                    load.wait_for(20)
                    stays_ready(front)
                    load.finish()
                    probes.finish()
            assert load.lost == []
            assert probes.lost == []
            for answer in [*without, *batch, *again]:
                assert answer["degraded"] == looked_up
                assert answer["decision"] in (contract.decision.above, contract.decision.below)
            assert front.process.pid == began_as
            assert front.process.poll() is None


def test_a_new_contract_is_taken_over_while_redis_is_gone_and_its_policies_hold(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    data: dict[str, Any] = contract.model_dump(mode="json")
    data["version"] = "2"
    demanded = next(k for k, f in enumerate(contract.features) if isinstance(f.source, FromView))
    data["features"][demanded]["missing"] = "reject"
    newer = make_bundle(tmp_path / "b2", ModelContract.model_validate(data), version="8", bias=-1.5)
    with Redis(tmp_path, *KEPT) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        with chain_of(bundle, tmp_path, tmp_path / "repo", PATIENT) as (behind, front):
            assert front.post(SCORE, row).status == 200
            redis.kill()
            assert front.post(SCORE, row).json["degraded"]
            behind.kill()
            with predictor(newer.path, tmp_path, port=behind.port) as changed:
                changed.wait()
                wait_until(lambda: front.post(SCORE, row).json.get("title") == "Feature store does not answer")
                refused = front.post(SCORE, row)
                assert refused.status == 503
                assert contract.features[demanded].name in refused.json["detail"]
                assert front.get("/v1/models/m/contract").json["contract_digest"] == newer.contract.digest
                front.wait()  # the predictor was gone for a moment
                stays_ready(front)
                with redis:
                    wait_until(lambda: front.post(SCORE, row).status == 200)
                    wait_until(lambda: front.post(SCORE, row).json["degraded"] == [])


def test_a_transformer_that_starts_without_its_redis_says_so_and_is_ready_when_it_comes(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    row = synthetic_rows(contract, 1, seed=0)[0]
    with Redis(tmp_path, *KEPT) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        redis.kill()
        with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=tmp_path / "repo", args=PATIENT) as front:
            behind.wait()
            front.wait("/health/live")
            wait_until(lambda: "feature store can't be reached" in front.get(READY).json.get("detail", ""))
            refused = front.post(SCORE, row)
            assert refused.status == 503
            assert "feature store can't be reached" in refused.json["detail"]
            assert front.get(READY).status == 503
            assert "\ninference_active 0.0\n" in front.get("/metrics").body.decode()
            with redis:
                front.wait()
                assert front.post(SCORE, row).json["degraded"] == []
                assert "\ninference_active 1.0\n" in front.get("/metrics").body.decode()


@pytest.mark.parametrize("given", ["", "s3cret,n4me=v4lue"], ids=["none", "with a comma"])
def test_a_password_that_cannot_be_right_never_gets_ready_and_is_not_shown(
    bundle: Bundle, contract: ModelContract, tmp_path: Path, given: str,
) -> None:
    with Redis(tmp_path, *KEPT) as redis:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=redis.address)
        redis.kill()
    config = tmp_path / "repo" / "feature_store.yaml"
    config.write_text(config.read_text().replace(redis.address, "${HAFNIUM_REDIS}"))
    with Redis(tmp_path, "--requirepass", given or "s3cret") as locked, predictor(bundle.path, tmp_path) as behind, transformer(
        behind.port, tmp_path, repo=tmp_path / "repo", args=PATIENT, env={"HAFNIUM_REDIS": f"{locked.address},password={given}"},
    ) as front:
        behind.wait()
        front.wait("/health/live")
        expected = "comma" if "," in given else "refused"
        wait_until(lambda: expected in front.get(READY).json.get("detail", ""))
        assert front.get(READY).status == 503
        for part in (p for p in given.replace("=", ",").split(",") if len(p) > 1):
            assert part not in front.log
            assert part not in front.get(READY).body.decode()
