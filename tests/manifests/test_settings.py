"""Every container's args and env go through that part's own parser: a flag that it doesn't know is found here, not by a pod that dies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hafnium_command_lines import USAGE_ERRORS, parsed, shell_words
from hafnium_manifests import ROOT, Json, Pod, load, pods
from hafnium_redis import Redis
from redis import Redis as RedisClient

from hafnium_contract.errors import InputError
from hafnium_local.__main__ import app
from hafnium_local.rendered_manifests import PRODUCTS
from hafnium_monitoring.__main__ import _parser as monitoring_parser  # pyright: ignore[reportPrivateUsage]
from hafnium_predictor import settings as predictor
from hafnium_rollout.controller_settings import load_settings
from hafnium_rollout.kubernetes import settings as operator
from hafnium_rollout.kubernetes.ray_jobs import ray_job, read_template
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.retraining.policy import Attempt
from hafnium_transformer import settings as transformer

HAFNIUM = typer.main.get_command(app)
BIN = "/opt/hafnium/bin"
"""Where the images have the programs of others."""
KSERVE_ARGS = ["--model_name", "unified-risk", "--predictor_host", "unified-risk-predictor.risk", "--http_port", "8080"]
"""What KServe adds to a custom transformer."""
REDIS = ["redis-server", "--dir", "/data", "--appendonly", "yes", "--requirepass", "$(REDIS_PASSWORD)"]


def found() -> list[Any]:
    return [pytest.param(name, pod, c, id=f"{name}:{pod.where}:{c['name']}")
            for name in PRODUCTS for pod in pods(load(name)) for c in pod.containers()]


def part_of(container: Json) -> str:
    return container["image"].rpartition("/")[2].partition(":")[0].removeprefix("hafnium-")


def environment(name: str, container: Json) -> dict[str, str]:
    """env and envFrom, with ConfigMaps of the manifest (of one name they say the same); secrets as some text."""
    maps = {o["metadata"]["name"]: o["data"] for o in load(name) if o["kind"] == "ConfigMap"}
    out: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            out |= maps[source["configMapRef"]["name"]]
    for e in container.get("env", []):
        named = e.get("valueFrom", {}).get("configMapKeyRef")
        out[e["name"]] = maps[named["name"]][named["key"]] if named else expanded(e.get("value", "a-secret"), out)
    return out


def expanded(text: str, env: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), text)


def arguments(container: Json, env: Mapping[str, str]) -> list[str]:
    return [expanded(a.replace("{{.Name}}", "unified-risk"), env) for a in container.get("args", [])]


def drains(pod: Pod, container: Json, stop_s: float) -> None:
    """SIGKILL comes after what the server gives to requests in hand, to its log and to its spans."""
    if "lifecycle" not in container:  # Knative's proxy drains, and refuses a hook
        return
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod.spec["terminationGracePeriodSeconds"] >= pause_s + stop_s, pod.where


def ports(container: Json) -> set[int]:
    return {p["containerPort"] for p in container["ports"]}


@pytest.mark.parametrize(("name", "pod", "container"), found())
def test_the_part_takes_its_arguments(
    name: str, pod: Pod, container: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, env = part_of(container), environment(name, container)
    given = arguments(container, env)
    if part == "predictor":
        served = predictor.parse_settings(given, env)
        assert served.sdk_arguments == ()
        assert served.model_name == "unified-risk"
        assert ports(container) == {served.http_port}
        drains(pod, container, served.stop_s)
    elif part == "transformer":
        collocated = container["name"] == "transformer-container"
        asked = transformer.parse_settings([*given, *([] if collocated else KSERVE_ARGS)], env)
        assert asked.sdk_arguments == ()
        assert asked.feature_repo is not None
        assert asked.inference_log, "without it drift and scores have nothing to look at"
        assert ports(container) == {asked.http_port}
        if collocated:
            (other,) = [c for c in pod.containers() if part_of(c) == "predictor"]
            (port,) = ports(other)
            assert asked.predictor_host == f"localhost:{port}"
        drains(pod, container, asked.stop_s)
    elif part == "rollout":
        assert given[0] == "operator"
        guards = operator.parse_settings(given[1:], env)
        assert ports(container) == {guards.http_port}
        assert guards.lease_namespace == pod.namespace
        lease = [o for o in load(name) if o["kind"] == "Role" and o["metadata"].get("namespace") == pod.namespace]
        assert [guards.lease_name] in [r.get("resourceNames") for o in lease for r in o["rules"]]
        unknown = {k for k in env if k.startswith(operator.ENVIRONMENT_PREFIX)} - {
            operator.ENVIRONMENT_PREFIX + n.upper() for n in operator.Settings.model_fields}
        assert not unknown
        if guards.settings_file is not None:
            files = {**next(o["data"] for o in load(name) if o["metadata"]["name"].startswith("hafnium-rollout-platform"))}
            (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "platform"]
            assert guards.settings_file.parent == Path(mount)
            for file, text in files.items():
                (tmp_path / file).write_text(text, encoding="utf-8")
            retraining = load_settings(tmp_path / guards.settings_file.name).retraining
            assert retraining.policy == "start"
            assert retraining.ray_job_template is not None
            template = read_template(tmp_path / retraining.ray_job_template.relative_to(mount))
            made = {"kind": "RayJob", "metadata": {"name": "t", "namespace": "risk"}, "spec": template["spec"]}
            assert all(":" in c["image"] for p in pods([made]) for c in p.containers())
            assert guards.data_folder is not None
        monitors = [e["interval"] for o in load(name) if o["kind"] == "PodMonitor" for e in o["spec"]["podMetricsEndpoints"]]
        assert all(i == f"{guards.scrape_interval_s:g}s" for i in monitors)
        if any(o["kind"] == "ModelRollout" for o in load(name)):
            assert guards.prometheus_url, "gates over requests need it"
            gates = [g for o in load(name) if o["kind"] == "ModelRollout" for g in o["spec"]["gates"] if "scores" in g]
            writers = [c for p in pods(load(name)) for c in p.containers() if part_of(c) == "transformer"]
            logs = {environment(name, c)["HAFNIUM_INFERENCE_LOG"] for c in writers}
            assert not gates or {guards.inference_log} == logs, "the operator reads where the transformers write"
    elif part == "monitoring":
        monitoring_parser().parse_args(given)
    elif part == "training" and pod.where.startswith("RayJob/"):
        assert "command" not in container, "KubeRay writes it: see rayStartParams and entrypoint below"
        assert given == []
    elif part == "training" and container.get("command") == [f"{BIN}/mlflow"]:
        takes_mlflows_arguments(name, pod, container, monkeypatch)
    elif part == "training":
        assert "command" not in container
        parsed(HAFNIUM, "hafnium", given)
    else:
        assert part == "redis", f"{container['image']}: nobody knows how to read its arguments"
        program, *options = given
        assert program == "redis-server"
        (mount,) = container["volumeMounts"]
        assert options[options.index("--dir") + 1] == mount["mountPath"]
        with Redis(tmp_path, *(str(tmp_path) if o == mount["mountPath"] else o for o in options)) as running:  # it can't only look at them
            said: Any = RedisClient(port=running.port, password=env["REDIS_PASSWORD"], decode_responses=True).config_get("*")
        keeps_values_and_has_room_for_a_fork(said, container["resources"]["limits"]["memory"])


def keeps_values_and_has_room_for_a_fork(said: Mapping[str, str], limit: str) -> None:
    assert (said["appendonly"], said["save"]) == ("yes", ""), "one file, and no fork for another"
    assert said["maxmemory-policy"] == "noeviction", "a store that is full says so to who writes; it doesn't lose what is asked for"
    bytes_max = int(limit[:-2]) * {"Mi": 2**20, "Gi": 2**30}[limit[-2:]]
    # While the file is rewritten every page may be there twice; a quarter is left for what the allocator wastes, buffers and code
    assert 0 < 2 * int(said["maxmemory"]) <= 0.75 * bytes_max, "the kernel would kill it while it rewrites its file"


def takes_mlflows_arguments(name: str, pod: Pod, container: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.cli
    import mlflow.environment_variables as known

    env = environment(name, container)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    command, asked = parsed(mlflow.cli.cli, "mlflow", arguments(container, env))
    assert command == "server"
    assert asked["host"] == "0.0.0.0"  # noqa: S104 - a pod's
    assert ports(container) == {asked["port"]}
    (service,) = [o for o in load(name) if o["kind"] == "Service" and o["metadata"]["name"] == "hafnium-mlflow"]
    assert f"{service['metadata']['name']}:{asked['port']}" in asked["allowed_hosts"].split(",")
    volumes = [m["mountPath"] for m in container["volumeMounts"]]
    for place in (asked["backend_store_uri"].removeprefix("sqlite:///"), asked["artifacts_destination"]):
        assert Path(place).is_relative_to("/mnt/mlflow"), "the rest of the file system is read-only, or forgotten"
        assert "/mnt/mlflow" in volumes
    assert asked["serve_artifacts"] is True
    options = {p.envvar for p in mlflow.cli.server.params}
    assert {k for k in env if k.startswith("MLFLOW_") and k not in options and not hasattr(known, k)} == set()


def trainings() -> list[Any]:
    """Each RayJob that is applied, and each that the operator makes of a template, as it makes it."""
    out: list[Any] = []
    for name in PRODUCTS:
        objects = load(name)
        out += [pytest.param(name, o, id=f"{name}:{o['metadata']['name']}") for o in objects if o["kind"] == "RayJob"]
        for o in objects:
            if o["kind"] == "ConfigMap" and "rayjob.yaml" in o["data"]:
                (rollout,) = [ModelRollout.model_validate(r) for r in objects if r["kind"] == "ModelRollout"]
                attempt = Attempt(
                    id="risk-retrain-bbbbbbbb-1", time=datetime(2026, 1, 1, tzinfo=UTC), digest="sha256:" + "b" * 64, kind="drift",
                    findings=("a",), message="m", state="Intended")
                made = ray_job(yaml.safe_load(o["data"]["rayjob.yaml"]), attempt, rollout, "{}")
                out.append(pytest.param(name, {"kind": "RayJob", **made}, id=f"{name}:template"))
    return out


@pytest.mark.parametrize(("name", "job"), trainings())
def test_a_trainings_entrypoint_is_one_that_the_command_takes(name: str, job: Json) -> None:
    spec, meta = job["spec"], job["metadata"]
    head = next(p for p in pods([job]) if p.where.endswith("/head"))
    (container,) = head.containers()
    env = {**environment(name, container), **yaml.safe_load(spec.get("runtimeEnvYAML", "{}")).get("env_vars", {}),
           "RAY_CLUSTER_NAME": f"{meta['name']}-x7k9q"}
    program, *words = shell_words(spec["entrypoint"], env)
    assert program == "hafnium"
    command, asked = parsed(HAFNIUM, program, words)
    assert command == "train"
    trials = [] if asked["trial_storage"].startswith("s3://") else [Path(asked["trial_storage"])]
    for place in (asked["contract"], asked["data"], asked["out"], *trials):
        for pod in pods([job]):
            assert [m["mountPath"] for c in pod.containers() for m in c["volumeMounts"] if place.is_relative_to(m["mountPath"])], pod.where
    assert asked["out"].name == meta["name"], "the bundle is found by the RayJob's name"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert asked["at_once"] == workers["replicas"] <= asked["trials"]
    assert asked["tracking"] == "http://hafnium-mlflow:5000"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own modules, when they are imported
@pytest.mark.parametrize(("name", "job"), trainings())
def test_rays_own_command_takes_its_start_parameters(name: str, job: Json) -> None:
    """KubeRay makes of them `ray start --head --num-cpus=0 …`."""
    from ray.scripts.scripts import cli

    cluster = job["spec"]["rayClusterSpec"]
    for first, group in [("--head", cluster["headGroupSpec"]), *(("--address=head:6379", g) for g in cluster["workerGroupSpecs"])]:
        words = ["start", first, *(f"--{k}={v}" for k, v in group["rayStartParams"].items())]
        command, asked = parsed(cli, "ray", words)
        assert command == "start"
        assert asked["num_cpus"] == int(group["rayStartParams"]["num-cpus"])


@pytest.mark.parametrize(("environment", "folder"), [
    ({"RAY_CLUSTER_NAME": "hafnium-training-2-x7k9q"}, "hafnium-training-2"),
    ({"RAY_CLUSTER_NAME": "risk-retrain-bbbbbbbb-1-x7k9q", "HAFNIUM_TRAINING_NAME": "risk-retrain-bbbbbbbb-1"}, "risk-retrain-bbbbbbbb-1"),
])
@pytest.mark.parametrize("source", ["manifests/training.yaml", "kustomize/components/retraining/rayjob.yaml"])
def test_a_training_is_a_command_and_its_bundle_is_named_after_the_rayjob(source: str, environment: dict[str, str], folder: str) -> None:
    (job,) = [o for o in yaml.safe_load_all((ROOT / source).read_text(encoding="utf-8")) if o["kind"] == "RayJob"]
    program, *words = shell_words(job["spec"]["entrypoint"], environment)
    command, asked = parsed(HAFNIUM, program, words)
    assert (program, command) == ("hafnium", "train")
    assert asked["out"] == Path(f"/mnt/training/bundles/{folder}")


@pytest.mark.parametrize(("name", "where", "given"), [
    ("install.yaml", "Deployment/hafnium-rollout-operator", ["operator", "--look_seconds=1"]),
    ("dev.yaml", "InferenceService/unified-risk/predictor", ["--model_folder=/mnt/models"]),
    ("dev.yaml", "InferenceService/unified-risk/transformer", ["--feature_repository=/mnt/features"]),
    ("dev.yaml", "CronJob/hafnium-drift", ["drift", "--windows=1h"]),
    ("dev.yaml", "CronJob/hafnium-materialise", ["features", "materialise", "--contract=/a", "--repository=/b"]),
    ("dev.yaml", "CronJob/hafnium-materialise", ["features", "materialize"]),
    ("staging.yaml", "Deployment/hafnium-mlflow", ["server", "--host=0.0.0.0", "--ports=5000"]),
    ("staging.yaml", "Deployment/hafnium-mlflow", ["server", "--port=five"]),
    ("staging.yaml", "StatefulSet/redis", ["redis-server", "--dir", "/data", "--appendonlyy", "yes"]),
    ("staging.yaml", "StatefulSet/redis", [*REDIS, "--save", "", "--maxmemory", "1536mb"]),
    ("staging.yaml", "StatefulSet/redis", [*REDIS, "--save", "", "--maxmemory", "768mb", "--maxmemory-policy", "allkeys-lru"]),
    ("staging.yaml", "StatefulSet/redis", [*REDIS, "--save", "60", "1", "--maxmemory", "768mb"]),
])
def test_a_wrong_argument_is_found(
    name: str, where: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test above isn't blind: what it calls refuses what it should."""
    pod = next(p for p in pods(load(name)) if p.where == where)
    container = {**next(pod.containers()), "args": given}
    with pytest.raises((SystemExit, AssertionError, InputError, *USAGE_ERRORS)):
        test_the_part_takes_its_arguments(name, pod, container, tmp_path, monkeypatch)


@pytest.mark.parametrize("change", [("--trials 8", "--trial 8"), ("hafnium train", "hafnium trains"), ("--at-once 2", "--at-once two"),
                                    ("--data /mnt/training/training.parquet", "")])
def test_a_wrong_entrypoint_is_found(change: tuple[str, str]) -> None:
    (job,) = [o for o in load("training.yaml") if o["kind"] == "RayJob"]
    assert change[0] in job["spec"]["entrypoint"]
    wrong = {**job, "spec": {**job["spec"], "entrypoint": job["spec"]["entrypoint"].replace(*change)}}
    with pytest.raises(USAGE_ERRORS):
        test_a_trainings_entrypoint_is_one_that_the_command_takes("training.yaml", wrong)
