"""What all servers of the benchmark serve: a model trained on simulated transactions, and its features in SQLite and in Redis."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from processes import Process, free_port
from small_model import small_bundle

from hafnium_contract.bundle import Bundle, open_bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import FromRequest, FromView, ModelContract
from hafnium_contract.progress import Silent
from hafnium_training.feature_store import join, materialise, write_repo
from hafnium_training.pipeline import TrainOptions, train
from hafnium_training.simulation import simulate

CONTRACT = Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml"
UNTIL = datetime(2026, 2, 10, tzinfo=UTC)
"""Features are as of this day, and so are the requests."""
BODIES = 500


@dataclass(frozen=True)
class Setting:
    """Everything on disk, and the Redis that runs."""

    bundle: Bundle
    repos: dict[str, Path]
    bodies: dict[str, Path]
    spec: str
    """JSON for the naive chain: where each column comes from."""
    redis: Process | None


def redis_or_none(folder: Path) -> Process | None:
    """A Redis of Debian's, without persistence; not started yet."""
    program = shutil.which("redis-server")
    if program is None:
        return None
    port = free_port()
    argv = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    return Process("redis", argv, port, folder / "redis.log", ready=None)


def prepare(folder: Path, model: str) -> Setting:
    """Makes it all. Data, models and SQLite store are kept for the next time; Redis is filled anew. `model`: small or trained."""
    contract = load_contract(CONTRACT)
    data, table, made = folder / "data", folder / "table.parquet", folder / "bundle"
    repos = {"sqlite": folder / "repo-sqlite"}
    if not made.exists():
        print("making data, features and a model ...", flush=True)
        for old in (data, repos["sqlite"]):
            shutil.rmtree(old, ignore_errors=True)
        simulate(data, days=60, seed=7)
        write_repo(contract, data, repos["sqlite"])
        join(contract, repos["sqlite"], data, table)
        materialise(contract, repos["sqlite"], until=UNTIL)
        train(TrainOptions(CONTRACT, table, made, seed=7, until=datetime(2026, 2, 24, tzinfo=UTC)), Silent())
    redis = redis_or_none(folder)
    if redis is not None:
        redis.start()
        redis.wait()
        repos["redis"] = folder / "repo-redis"
        shutil.rmtree(repos["redis"], ignore_errors=True)
        write_repo(contract, data, repos["redis"], redis=f"127.0.0.1:{redis.port}")
        materialise(contract, repos["redis"], until=UNTIL)
    bundle = open_bundle(made)
    if model == "small":
        small = folder / "small-bundle"
        bundle = open_bundle(small) if small.exists() else small_bundle(bundle, small)
    return Setting(bundle, repos, _bodies(contract, data, folder / "bodies"), json.dumps(_spec(contract)), redis)


def _spec(contract: ModelContract) -> dict[str, Any]:
    columns: list[dict[str, Any]] = []
    references: list[str] = []
    for f in contract.inputs:
        if isinstance(f.source, FromRequest):
            codes = {c: i for i, c in enumerate(f.categories)}
            columns.append({"from": "request", "name": f.name, "codes": codes})
        elif isinstance(f.source, FromView):
            references.append(f"{f.source.view}:{f.source.field}")
            columns.append({"from": "view", "name": f"{f.source.view}__{f.source.field}"})
        else:
            columns.append({"from": "derived", "name": f.name})
    return {"columns": columns, "references": references, "keys": [e.join_key for e in contract.entities]}


def _bodies(contract: ModelContract, data: Path, folder: Path) -> dict[str, Path]:
    """Request bodies, one a line: for predictors (numbers) and for chains (transactions), of 1 and of 64 rows."""
    from hafnium_training.replay_requests import score_requests

    requests = [dict(r) for _, r in zip(range(BODIES), score_requests(contract, data, start=UNTIL, limit=BODIES), strict=False)]
    rng = random.Random(1)
    width = len(contract.inputs)
    numbers = [[round(rng.uniform(0, 50), 3) for _ in range(width)] for _ in requests]
    # The chains see what a caller sends: names and values. The naive one takes them flat, as KServe's examples do.
    flat = [{**r["entity"], **r["features"]} for r in requests]
    for r in flat:
        for f in contract.request_fields:
            r.setdefault(f, 0 if not contract.request_fields[f].categories else contract.request_fields[f].categories[0])
    full = [{"entity": r["entity"], "event_time": r["event_time"], "features": {k: v for k, v in f.items() if k in contract.request_fields}}
            for r, f in zip(requests, flat, strict=True)]

    def groups(rows: list[Any]) -> list[list[Any]]:
        return [[rows[(i * 64 + k) % len(rows)] for k in range(64)] for i in range(20)]

    texts = {
        "rows1": [{"instances": [n]} for n in numbers], "rows64": [{"instances": g} for g in groups(numbers)],
        "v2": [{"id": "b", "inputs": [{"name": "features", "shape": [1, width], "datatype": "FP32", "data": n}]} for n in numbers],
        "bento1": [{"instances": [n]} for n in numbers],
        "chain1": full, "chain64": [{"requests": g} for g in groups(full)],
        "explain1": [{**r, "explain": True} for r in full],
        "naive1": [{"instances": [r]} for r in flat], "naive64": [{"instances": g} for g in groups(flat)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, bodies in texts.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(json.dumps(b) for b in bodies) + "\n")
    return paths


def git_describe() -> str:
    """Which commit was measured."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
