"""What must hold of every object that is installed, whichever overlay it is from."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hafnium_manifests import FOLDER, ROOT, Json, Pod, load, pods, selects

from hafnium_local.rendered_manifests import PARTS, PRODUCTS
from hafnium_rollout.objects import ModelRollout

MANIFESTS = sorted(PRODUCTS)
OVERLAYS = [n for n in MANIFESTS if n not in ("crds.yaml", "install.yaml", "training.yaml")]
WITH_TOKEN = {"hafnium-rollout-operator", "hafnium-monitoring"}
"""Accounts of those who ask the API server something."""
DRAIN_SPARE_S = 3
"""Of spans and log lines after the last answer."""


def named(name: str) -> list[tuple[str, Json]]:
    return [(f"{o['kind']}/{o['metadata']['name']}", o) for o in load(name)]


def of_kind(name: str, *kinds: str) -> list[Json]:
    return [o for o in load(name) if o["kind"] in kinds]


def all_pods() -> list[Any]:
    return [pytest.param(p, id=f"{name}:{p.where}") for name in MANIFESTS for p in pods(load(name))]


def effective(pod: Pod, container: Json, field: str) -> Any:
    return container.get("securityContext", {}).get(field, pod.spec.get("securityContext", {}).get(field))


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_object_is_there_twice_and_each_namespace_is_made(name: str) -> None:
    keys = [(o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in load(name)]
    assert len(keys) == len(set(keys))
    made = {o["metadata"]["name"]: o for o in of_kind(name, "Namespace")}
    assert {k[2] for k in keys} - {None} == (set(made) or {"risk"} if name == "training.yaml" else set(made))
    for namespace in made.values():
        for mode in ("enforce", "audit", "warn"):
            assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"


def test_the_manifests_are_there_and_hold_pods() -> None:
    assert {p.name for p in FOLDER.glob("*.yaml")} == set(PRODUCTS)
    assert [p.where for p in pods(load("install.yaml"))] == ["Deployment/hafnium-rollout-operator"]
    for name in OVERLAYS:
        assert {"predictor", "transformer"} <= {p.where.rpartition("/")[2] for p in pods(load(name))}, name


@pytest.mark.parametrize("pod", all_pods())
def test_a_pod_is_restricted_read_only_and_limited(pod: Pod) -> None:
    for c in pod.containers():
        where = f"{pod.where} {c['name']}"
        assert effective(pod, c, "runAsNonRoot") is True, where
        assert effective(pod, c, "runAsUser"), where
        assert effective(pod, c, "seccompProfile") == {"type": "RuntimeDefault"}, where
        own = c.get("securityContext", {})
        assert own.get("allowPrivilegeEscalation") is False, where
        assert own.get("capabilities") == {"drop": ["ALL"]}, where
        assert own.get("readOnlyRootFilesystem") is True, where
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(c.get("resources", {}).get(kind, {})), f"{where} {kind}"
        mounted = {m["name"] for m in c.get("volumeMounts", [])}
        assert mounted <= {v["name"] for v in pod.spec.get("volumes", [])} | {"data"}, where  # data: a StatefulSet's claim
    for volume in pod.spec.get("volumes", []):
        assert "hostPath" not in volume, pod.where
        assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), f"{pod.where} {volume['name']}"


@pytest.mark.parametrize("pod", all_pods())
def test_an_image_has_a_tag_that_means_one_thing(pod: Pod) -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    for c in pod.containers():
        image = c["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        assert tag not in ("", "latest"), image
        if "hafnium" in image:
            assert tag == version[1], image


def test_images_are_said_in_one_place() -> None:
    said = yaml.safe_load((ROOT / "kustomize/components/images/kustomization.yaml").read_text(encoding="utf-8"))["images"]
    assert all(i["newTag"] for i in said)
    for path in (ROOT / "kustomize").rglob("*.yaml"):
        written_by_hand = path.relative_to(ROOT / "kustomize").as_posix() not in PARTS
        if "samples" not in path.parts and path.parent.name != "images" and written_by_hand:
            for image in re.findall(r"^\s*-?\s*image: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                assert not re.search("[:/]", image), f"{path}: {image}: tags and registries belong to components/images"


@pytest.mark.parametrize("pod", [p for p in all_pods() if p.values[0].lasting])
def test_what_lasts_is_probed_and_drained(pod: Pod) -> None:
    assert "terminationGracePeriodSeconds" in pod.spec or "knative" in str(pod.where) or pod.spec.get("scaleMetric") == "concurrency"
    for c in pod.spec["containers"]:
        where = f"{pod.where} {c['name']}"
        for kind in ("readinessProbe", "livenessProbe"):
            assert kind in c, f"{where}: {kind}"
        ports = {p["containerPort"] for p in c["ports"]} | {p.get("name") for p in c["ports"]}
        for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
            for how in ("httpGet", "tcpSocket"):
                if how in c.get(kind, {}):
                    assert c[kind][how]["port"] in ports, f"{where}: {kind} asks at a port that it hasn't got"
        # A pod that can't serve is taken out sooner than it is killed.
        ready, live = c["readinessProbe"], c["livenessProbe"]
        assert ready["periodSeconds"] * ready.get("failureThreshold", 3) < live["periodSeconds"] * live.get("failureThreshold", 3), where


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_has_an_account_that_is_there_and_a_token_only_where_it_is_needed(name: str) -> None:
    accounts = {(o["metadata"].get("namespace"), o["metadata"]["name"]): o for o in of_kind(name, "ServiceAccount")}
    for account in accounts.values():
        assert account["automountServiceAccountToken"] is False, account["metadata"]["name"]
    for pod in pods(load(name)):
        account = pod.spec.get("serviceAccountName")
        assert (pod.namespace, account) in accounts, pod.where
        assert pod.spec.get("automountServiceAccountToken") is (account in WITH_TOKEN), pod.where


@pytest.mark.parametrize("name", MANIFESTS)
def test_selectors_find_what_they_are_for(name: str) -> None:
    objects, there = load(name), pods(load(name))
    for o in objects:
        where, namespace, spec = f"{o['kind']}/{o['metadata']['name']}", o["metadata"].get("namespace"), o.get("spec", {})
        near = [p for p in there if p.namespace == namespace]
        if o["kind"] in ("Deployment", "StatefulSet"):
            assert selects(spec["selector"], spec["template"]["metadata"]["labels"]), where
            for constraint in spec["template"]["spec"].get("topologySpreadConstraints", []):
                assert selects(constraint["labelSelector"], spec["template"]["metadata"]["labels"]), where
        elif o["kind"] == "Service":
            found = [p for p in near if selects({"matchLabels": spec["selector"]}, p.labels)]
            assert found, where
            names = {p.get("name") for pod in found for c in pod.containers() for p in c.get("ports", [])}
            assert {p["targetPort"] for p in spec["ports"] if isinstance(p.get("targetPort"), str)} <= names, where
        elif o["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            assert any(selects(spec["selector"], p.labels) for p in near if p.lasting), where
        elif o["kind"] == "ServiceMonitor":
            services = [s for s in objects if s["kind"] == "Service" and s["metadata"].get("namespace") == namespace
                        and selects(spec["selector"], s["metadata"].get("labels", {}))]
            assert [s["metadata"]["name"] for s in services] == [o["metadata"]["name"]], where
            assert {e["port"] for e in spec["endpoints"]} <= {p["name"] for s in services for p in s["spec"]["ports"]}, where


@pytest.mark.parametrize("name", [*OVERLAYS, "training.yaml"])
def test_network_policies_are_about_pods_that_exist(name: str) -> None:
    policies, there = of_kind(name, "NetworkPolicy"), pods(load(name))
    if not policies:
        assert name in ("dev.yaml", "knative.yaml")
        return
    for namespace in {o["metadata"]["name"] for o in of_kind(name, "Namespace")}:
        mine = [p for p in policies if p["metadata"]["namespace"] == namespace]
        denying = [p for p in mine if p["spec"]["podSelector"] == {} and "ingress" not in p["spec"] and "egress" not in p["spec"]]
        assert [sorted(p["spec"]["policyTypes"]) for p in denying] == [["Egress", "Ingress"]], f"{namespace}: denied unless allowed"
        for pod in (p for p in there if p.namespace == namespace and p.lasting):
            reaching = [p for p in mine if selects(p["spec"]["podSelector"], pod.labels) and p["spec"].get("ingress")]
            assert reaching, f"nobody reaches {pod.where}"
    for policy in policies:
        near = [p for p in there if p.namespace == policy["metadata"]["namespace"]]
        assert any(selects(policy["spec"]["podSelector"], p.labels) for p in near), policy["metadata"]["name"]
        for rule in policy["spec"].get("ingress", []):
            targets = [p for p in near if selects(policy["spec"]["podSelector"], p.labels)]
            ports = {p["containerPort"] for t in targets for c in t.containers() for p in c.get("ports", [])}
            assert {p["port"] for p in rule.get("ports", [])} <= ports, f"{policy['metadata']['name']}: a port that nobody listens at"


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_volume_claim_is_there(name: str) -> None:
    claims = {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in of_kind(name, "PersistentVolumeClaim")}
    suspended = {f"CronJob/{o['metadata']['name']}" for o in of_kind(name, "CronJob") if o["spec"].get("suspend")}
    assert suspended <= {"CronJob/hafnium-performance"}, "it waits for somebody's labels"
    for pod in pods(load(name)):
        for volume in pod.spec.get("volumes", []):
            if "persistentVolumeClaim" in volume and pod.where not in suspended:
                assert (pod.namespace, volume["persistentVolumeClaim"]["claimName"]) in claims, f"{pod.where} {volume['name']}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_jobs_end_and_do_not_pile_up(name: str) -> None:
    for o in of_kind(name, "CronJob"):
        spec, where = o["spec"], o["metadata"]["name"]
        assert spec["concurrencyPolicy"] == "Forbid", where
        assert {"startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= set(spec), where
        assert {"activeDeadlineSeconds", "backoffLimit"} <= set(spec["jobTemplate"]["spec"]), where
    for o in of_kind(name, "RayJob"):
        assert {"activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"} <= set(o["spec"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_is_written_down(name: str) -> None:
    assert not of_kind(name, "Secret")
    for pod in pods(load(name)):
        for c in pod.containers():
            for e in c.get("env", []):
                if re.search(r"PASSWORD|SECRET|TOKEN|KEY", e["name"]):
                    assert "secretKeyRef" in e.get("valueFrom", {}), f"{pod.where} {e['name']}"
                assert "password=" not in e.get("value", "") or "password=$(" in e["value"], f"{pod.where} {e['name']}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_bindings_name_roles_and_accounts_that_are_there(name: str) -> None:
    roles = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in of_kind(name, "Role", "ClusterRole")}
    accounts = {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in of_kind(name, "ServiceAccount")}
    bound: set[str] = set()
    for o in of_kind(name, "RoleBinding", "ClusterRoleBinding"):
        ref, namespace = o["roleRef"], o["metadata"].get("namespace")
        assert (ref["kind"], namespace if ref["kind"] == "Role" else None, ref["name"]) in roles, o["metadata"]["name"]
        bound.add(ref["name"])
        for s in o["subjects"]:
            assert (s.get("namespace", namespace), s["name"]) in accounts, o["metadata"]["name"]
    for _, _, role in roles:
        people = role in ("hafnium-viewer", "hafnium-releaser", "hafnium-approver") or role.startswith("hafnium-approve-")
        assert (role in bound) != people, f"{role}: roles for people are bound by the cluster's owner, all others here"
    lease = [r for o in of_kind(name, "Role") for r in o["rules"] if "leases" in r["resources"] and "resourceNames" in r]
    assert all(r["resourceNames"] == ["hafnium-rollout-operator"] for r in lease), "kustomize renames what is named like a ConfigMap"


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_namespace_asks_for_the_approvals_of_its_rollouts_and_the_sample_binds_who_gives_them(name: str) -> None:
    floor = {s for o in of_kind(name, "Namespace") if o["metadata"]["name"] == "risk"
             for s in o["metadata"].get("annotations", {}).get("hafnium.dev/required-approvals", "").split(",") if s}
    asked = {s for o in of_kind(name, "ModelRollout") for s in o["spec"].get("approvals", {}).get("required", [])}
    assert floor == asked, "without the floor a releaser could ask for less"
    assert bool(floor) == (name in ("staging.yaml", "prod.yaml"))
    given = list(yaml.safe_load_all((ROOT / "kustomize/samples/access.yaml").read_text(encoding="utf-8")))
    approvers = {s["name"] for o in given if o["roleRef"]["name"] == "hafnium-approver" for s in o["subjects"]}
    for stage in asked:
        (binding,) = [o for o in given if o["roleRef"]["name"] == f"hafnium-approve-{stage}"]
        assert {s["name"] for s in binding["subjects"]} <= approvers, f"{stage} needs both roles"


def test_the_operator_makes_trainings_in_the_namespace_of_the_models_only() -> None:
    seen: list[str] = []
    for name in OVERLAYS:
        for o in of_kind(name, "Role", "ClusterRole"):
            for rule in o["rules"]:
                if "rayjobs" in rule["resources"]:
                    assert (o["kind"], o["metadata"]["namespace"]) == ("Role", "risk"), "who creates RayJobs runs programs there"
                    assert sorted(rule["verbs"]) == ["create", "get"]
                    seen.append(name)
    assert seen == ["staging.yaml"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_model_is_two_to_ten_pods_by_its_own_measure_and_keeps_apart(name: str) -> None:
    for pod in (p for p in pods(load(name)) if p.where.endswith(("/predictor", "/transformer"))):
        spec = pod.spec
        if name == "dev.yaml":
            assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 1)
        elif name == "knative.yaml":
            assert (spec["minReplicas"], spec["maxReplicas"], spec["scaleMetric"], spec["scaleTarget"]) == (1, 10, "concurrency", 100)
            assert "containerConcurrency" not in spec, "KServe would start as many workers"
            continue
        else:
            assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
            cpu = {"cpu": spec.get("scaleTarget")} if "scaleMetric" in spec else {
                m["resource"]["name"]: m["resource"]["target"]["averageUtilization"] for m in spec["autoScaling"]["metrics"]
                if m["type"] == "Resource"}
            assert cpu == {"cpu": 70}
        terms = spec["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert [t["podAffinityTerm"]["topologyKey"] for t in terms] == ["kubernetes.io/hostname"]
        assert [t["topologyKey"] for t in spec["topologySpreadConstraints"]] == ["topology.kubernetes.io/zone"]
        for rule in (*(t["podAffinityTerm"] for t in terms), *spec["topologySpreadConstraints"]):
            assert selects(rule["labelSelector"], pod.labels)
            assert set(rule["matchLabelKeys"]) <= {*pod.labels, "pod-template-hash"}
            asked = {e["key"] for e in rule["labelSelector"].get("matchExpressions", [])} | {*rule["labelSelector"].get("matchLabels", {})}
            assert not asked & set(rule["matchLabelKeys"]), "the API server refuses such a pod, and only then"


@pytest.mark.parametrize("name", [n for n in OVERLAYS if of_kind(n, "ModelRollout")])
def test_a_model_rollout_is_one_that_the_operator_takes(name: str) -> None:
    (item,) = of_kind(name, "ModelRollout")
    rollout = ModelRollout.model_validate(item)
    assert rollout.spec.strategy.steps[-1].weight == 100
    assert not of_kind(name, "InferenceService"), "the operator makes the services"


def test_production_moves_traffic_as_its_owners_said() -> None:
    (item,) = of_kind("prod.yaml", "ModelRollout")
    steps = item["spec"]["strategy"]["steps"]
    assert steps[0]["shadow"] is True
    assert [(s["weight"], s["minDwell"]) for s in steps[1:]] == [(5, "24h"), (25, "48h"), (100, "1h")]
    (namespace,) = [o for o in of_kind("prod.yaml", "Namespace") if o["metadata"]["name"] == item["metadata"]["namespace"]]
    floor = namespace["metadata"]["annotations"]["hafnium.dev/required-approvals"].split(",")
    assert item["spec"]["approvals"]["required"] == floor


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_bundle_is_fetched_by_a_container_that_is_restricted_and_fits_its_address(name: str) -> None:
    """KServe's own has no security context: in a namespace of ours its pod is refused. One that is named must fit pvc://, too."""
    models = [(o["spec"]["service"], o["spec"]["model"]["storageUri"]) for o in of_kind(name, "ModelRollout")]
    models += [(o["spec"], o["spec"]["predictor"]["model"]["storageUri"]) for o in of_kind(name, "InferenceService")]
    assert models
    made = {o["metadata"]["name"]: o["spec"] for o in of_kind(name, "ClusterStorageContainer")}
    for model, uri in models:
        chosen = model["predictor"].get("storageContainerName")
        assert chosen or uri.startswith("pvc://")
        if chosen:
            formats = [f.get("prefix") or f["regex"] for f in made[chosen]["supportedUriFormats"]]
            for address in (uri, "pvc://bundles/v2", "s3://b/v2", "gs://b/v2", "hf://b/v2", "https://a.example/v2"):
                assert any(re.match(f, address) for f in formats), address
            assert made[chosen]["container"]["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"}}
