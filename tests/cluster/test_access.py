"""Who may do what: every right of every role, and what the API server itself checks about approvals and evidence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hafnium_kubectl import Kubectl, eventually, kustomized, renamed, role_binding, sample, without_pods
from kubernetes import client, config

pytestmark = pytest.mark.cluster
JSON = dict[str, Any]
DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "e" * 64
PEOPLE = {
    # user: ClusterRoles (of kustomize/base/access, but for the first)
    "view@example.com": ["view"],
    "edit@example.com": ["edit"],
    "rita@example.com": ["releaser"],
    "vera@example.com": ["approver", "approve-validation"],
    "sven@example.com": ["approver", "approve-security"],
    "thea@example.com": ["approver", "approve-validation"],  # she trained the sample's model
    "both@example.com": ["approver", "approve-validation", "releaser"],
    "named@example.com": ["approver", "approve-validation"],  # and may patch one ModelRollout, see below
    "stage@example.com": ["approve-validation"],
}


@pytest.fixture(scope="module")
def access(namespaced: Kubectl) -> Iterator[Kubectl]:
    """A namespace with operator, monitoring jobs, people and policies, as the repository's kustomizations make them."""
    kubectl, namespace = namespaced, namespaced.namespace
    parts = ("rollouts", "monitoring", "access")
    documents = [d for part in parts for d in renamed(without_pods(kustomized(f"kustomize/base/{part}")), namespace)]
    for user, roles in PEOPLE.items():
        for role in roles:
            name = role if role in ("view", "edit") else f"hafnium-{role}-{namespace}"
            documents.append(role_binding(f"{user.split('@')[0]}-{role}", name, user))
    documents.append({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "one-rollout"},
        "rules": [{"apiGroups": ["hafnium.dev"], "resources": ["modelrollouts"], "resourceNames": ["unified-risk"], "verbs": ["patch"]}],
    })
    documents.append(role_binding("named-one-rollout", "one-rollout", "named@example.com", role_kind="Role"))
    kubectl("apply", "--server-side", "-f", "-", given=documents)
    try:
        kubectl("apply", "--server-side", "-f", "-", given=sample("modelrollout"))
        eventually(lambda: kubectl.run("create", "--dry-run=server", "-f", "-", given=sample("modelevidence")).returncode != 0,
                   "the policy of evidence is in force")
        eventually(lambda: "trained this model" in kubectl.of("thea@example.com").run(
            "create", "--dry-run=server", "-f", "-", given=approval("validation", "thea@example.com")).stderr, "the policy of trainers is")
        eventually(lambda: "never changes" in kubectl.account("hafnium-rollout-operator").run(
            "patch", "mro", "unified-risk", "--dry-run=server", "--type=merge", "-p", '{"spec": {"paused": true}}').stderr,
            "the policy of the operator is")
        eventually(lambda: "run under" in kubectl.run(
            "create", "--dry-run=server", "-f", "-", given=templated(predictor={"serviceAccountName": "hafnium-monitoring"})).stderr,
            "the policy of accounts is")
        yield kubectl
    finally:
        cluster_wide = [d for d in documents if d["kind"].startswith(("Cluster", "Validating"))]
        kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", given=cluster_wide)


def approval(stage: str, approver: str, digest: str = DIGEST, name: str = "a") -> JSON:
    return {"apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelApproval", "metadata": {"name": name},
            "spec": {"modelDigest": digest, "stage": stage, "approver": approver}}


def templated(name: str = "templated", **parts: JSON) -> JSON:
    """The sample's ModelRollout under another name, with these fields in the parts of its template."""
    data = sample("modelrollout") | {"metadata": {"name": name}}
    for part, fields in parts.items():
        data["spec"]["service"][part] = [*fields] if isinstance(fields, list) else data["spec"]["service"].get(part, {}) | fields
    return data


def evidence(name: str, **metadata: Any) -> JSON:
    return sample("modelevidence") | {"metadata": {"name": name, **metadata}}


# --- rights ---------------------------------------------------------------------------------------------------------------------------

READ = {"get", "list", "watch"}
ALL = READ | {"create", "update", "patch", "delete"}
VERBS = sorted(ALL | {"deletecollection", "approve"})
RESOURCES = [
    "hafnium.dev/modelrollouts", "hafnium.dev/modelrollouts/status", "hafnium.dev/modelrollouts/finalizers",
    "hafnium.dev/modelevidences", "hafnium.dev/modelapprovals",
    "hafnium.dev/approvalstages:validation", "hafnium.dev/approvalstages:security",
    "serving.kserve.io/inferenceservices", "gateway.networking.k8s.io/httproutes", "gateway.networking.k8s.io/gateways",
    "/pods", "/pods/exec", "/secrets", "/configmaps", "/services", "/events", "/serviceaccounts/token", "apps/deployments", "batch/jobs",
    "coordination.k8s.io/leases:hafnium-rollout-operator", "coordination.k8s.io/leases:another",
    "rbac.authorization.k8s.io/roles", "rbac.authorization.k8s.io/rolebindings",
    "admissionregistration.k8s.io/validatingadmissionpolicies", "apiextensions.k8s.io/customresourcedefinitions",
]
OPERATOR, MONITORING = "serviceaccount:hafnium-rollout-operator", "serviceaccount:hafnium-monitoring"
H = "hafnium.dev/"
RIGHTS: dict[str, dict[str, set[str]]] = {
    OPERATOR: {
        H + "modelrollouts": READ | {"patch"}, H + "modelevidences": READ | {"delete"}, H + "modelapprovals": {"list", "watch"},
        H + "modelrollouts/status": {"patch"}, "serving.kserve.io/inferenceservices": ALL,
        "gateway.networking.k8s.io/httproutes": {"list", "watch", "create", "patch"},
        "gateway.networking.k8s.io/gateways": {"list"}, "/pods": {"list"}, "/events": {"create"},
        "coordination.k8s.io/leases:hafnium-rollout-operator": {"get", "create", "update"},
        "coordination.k8s.io/leases:another": {"create"},
    },
    MONITORING: {H + "modelevidences": {"create"}, H + "modelrollouts": {"get", "list"}},
    "rita@example.com": {
        H + "modelrollouts": ALL, H + "modelrollouts/status": READ, H + "modelevidences": READ, H + "modelapprovals": READ,
    },
    "vera@example.com": {
        H + "modelapprovals": READ | {"create"}, H + "modelrollouts": READ, H + "modelrollouts/status": READ, H + "modelevidences": READ,
        H + "approvalstages:validation": {"approve"},
    },
    "nobody@example.com": {},
}


@pytest.fixture(scope="module")
def allowed(access: Kubectl) -> Any:
    """(user, resource) → verbs that the API server allows there."""
    api = client.AuthorizationV1Api(config.new_client_from_config())

    def ask(user: str, resource: str) -> set[str]:
        if user.startswith("serviceaccount:"):
            user = f"system:serviceaccount:{access.namespace}:{user.split(':')[1]}"
        groups = ["system:authenticated"]
        group, _, rest = resource.partition("/")
        rest, _, name = rest.partition(":")
        kind, _, subresource = rest.partition("/")
        return {
            verb for verb in VERBS if api.create_subject_access_review({"spec": {
                "user": user, "groups": groups, "resourceAttributes": {
                    "group": group, "resource": kind, "subresource": subresource, "name": name, "verb": verb,
                    "namespace": access.namespace}}}).status.allowed
        }
    return ask


@pytest.mark.parametrize("user", sorted(RIGHTS))
def test_each_role_has_these_rights_and_no_other(allowed: Any, user: str) -> None:
    found = {resource: allowed(user, resource) for resource in RESOURCES}
    assert {r: v for r, v in found.items() if v} == RIGHTS[user]


def test_nobody_but_the_operator_writes_a_status(allowed: Any) -> None:
    for user in (*PEOPLE, MONITORING):
        assert not allowed(user, H + "modelrollouts/status") - READ, user
    assert "patch" in allowed(OPERATOR, H + "modelrollouts/status")


def test_whoever_may_view_or_edit_a_namespace_sees_rollouts_and_moves_none(access: Kubectl, allowed: Any) -> None:
    eventually(lambda: access.of("view@example.com").can("list", "modelrollouts"), "the viewer's rules are aggregated to `view`")
    for user in ("view@example.com", "edit@example.com"):
        for kind in ("modelrollouts", "modelevidences", "modelapprovals"):
            assert allowed(user, H + kind) == READ, f"{user} {kind}"


@pytest.mark.parametrize(("user", "verb", "resource", "may"), [
    ("rita@example.com", "patch", "modelrollouts", True), ("rita@example.com", "create", "modelapprovals", False),
    ("vera@example.com", "create", "modelapprovals", True), ("vera@example.com", "delete", "modelapprovals", False),
    ("vera@example.com", "patch", "modelrollouts", False), ("view@example.com", "list", "mev", True),
    (OPERATOR, "patch", "modelrollouts --subresource=status", True), (OPERATOR, "delete", "modelrollouts", False),
    (OPERATOR, "delete", "modelevidences", True), (OPERATOR, "create", "modelevidences", False),
    (OPERATOR, "patch", "modelevidences", False), ("rita@example.com", "delete", "modelevidences", False),
    ("vera@example.com", "delete", "modelevidences", False), ("edit@example.com", "delete", "modelevidences", False),
    (OPERATOR, "get", "secrets", False), (MONITORING, "create", "modelevidences", True), (MONITORING, "patch", "modelevidences", False),
    (MONITORING, "list", "secrets", False),
], ids=lambda x: str(x).split("@")[0])
def test_kubectl_auth_can_i(access: Kubectl, user: str, verb: str, resource: str, may: bool) -> None:
    kubectl = access.account(user.split(":")[1]) if user.startswith("serviceaccount:") else access.of(user)
    assert kubectl.can(verb, *resource.split()) is may


# --- approvals ------------------------------------------------------------------------------------------------------------------------


def test_an_approver_approves_in_their_own_name(access: Kubectl) -> None:
    access.of("vera@example.com")("create", "-f", "-", given=sample("modelapproval"))
    line = access("get", "modelapprovals").splitlines()[1]
    assert line.split()[:3] == ["unified-risk-2-validation", "validation", "vera@example.com"]


@pytest.mark.parametrize(("user", "stage", "approver", "words"), [
    ("vera@example.com", "validation", "sven@example.com", "spec.approver is sven@example.com, but you are vera@example.com"),
    ("vera@example.com", "security", "vera@example.com", "vera@example.com may not approve security"),
    ("thea@example.com", "validation", "thea@example.com",
     "thea@example.com trained this model (ModelRollout unified-risk, spec.model.trainedBy): somebody else has to approve it"),
    ("both@example.com", "validation", "both@example.com", "whoever brings"),
    ("named@example.com", "validation", "named@example.com", "you may patch ModelRollout unified-risk"),
    ("stage@example.com", "validation", "stage@example.com", "cannot create resource"),
    ("rita@example.com", "validation", "rita@example.com", "cannot create resource"),
], ids=["another's name", "another stage", "the trainer", "a releaser", "who may patch this rollout", "without the role", "releaser only"])
def test_an_approval_is_refused_and_the_reason_told(access: Kubectl, user: str, stage: str, approver: str, words: str) -> None:
    assert words in access.of(user).refused("create", "-f", "-", given=approval(stage, approver))


def test_not_even_the_clusters_admin_approves(access: Kubectl) -> None:
    """They can bring any model in, so their approval would be no second pair of eyes."""
    name = json.loads(access("auth", "whoami", "-o", "json"))["status"]["userInfo"]["username"]
    said = access.refused("create", "-f", "-", given=approval("validation", name, OTHER))
    assert "you may create ModelRollouts in this namespace: whoever brings models in can't approve them" in said


def test_a_releaser_approves_no_model_of_the_namespace(access: Kubectl) -> None:
    """Also not one that no ModelRollout names yet."""
    said = access.of("both@example.com").refused("create", "-f", "-", given=approval("validation", "both@example.com", OTHER))
    assert "whoever brings models in can't approve them" in said


def test_who_trained_another_model_may_approve_this_one(access: Kubectl) -> None:
    access.of("thea@example.com")("create", "--dry-run=server", "-f", "-", given=approval("validation", "thea@example.com", OTHER))


def test_an_approval_never_changes_and_only_admins_remove_it(access: Kubectl) -> None:
    access.of("sven@example.com")("create", "-f", "-", given=approval("security", "sven@example.com", name="kept"))
    for user in ("sven@example.com", "rita@example.com"):
        assert "cannot delete" in access.of(user).refused("delete", "modelapproval", "kept")
        assert "cannot patch" in access.of(user).refused("label", "modelapproval", "kept", "x=y")
    assert "labels of a record never change" in access.refused("label", "modelapproval", "kept", "x=y")
    patch = json.dumps({"spec": {"approver": "vera@example.com"}})
    assert "never change" in access.refused("patch", "modelapproval", "kept", "--type=merge", "-p", patch)
    access("delete", "modelapproval", "kept")


def test_a_namespace_asks_for_approvals_that_no_rollout_can_leave_out(access: Kubectl) -> None:
    rita = access.of("rita@example.com")
    data = sample("modelrollout") | {"metadata": {"name": "floor"}}
    data["spec"]["approvals"] = {"required": ["validation"]}
    access("annotate", "namespace", access.namespace, "hafnium.dev/required-approvals=validation, security")
    try:
        eventually(lambda: rita.run("create", "--dry-run=server", "-f", "-", given=data).returncode != 0, "the annotation is seen")
        said = rita.refused("create", "-f", "-", given=data)
        assert f"spec.approvals.required must name security: namespace {access.namespace} asks for it" in said
        del data["spec"]["approvals"]
        assert "must name validation, security" in rita.refused("create", "-f", "-", given=data)
        # What is there already can always be aborted, but not be given fewer approvals or another model.
        data["spec"]["approvals"] = {"required": ["security", "validation"]}
        rita("create", "-f", "-", given=data)
        access("annotate", "--overwrite", "namespace", access.namespace, "hafnium.dev/required-approvals=validation,security,compliance")
        eventually(lambda: rita.run(
            "patch", "mro", "floor", "--type=merge", "--dry-run=server", "-p", '{"spec": {"approvals": {"required": []}}}',
        ).returncode != 0, "the annotation is seen")
        abort = {"spec": {"action": {"type": "Abort", "id": "1", "candidateDigest": DIGEST}}}
        rita("patch", "mro", "floor", "--type=merge", "-p", json.dumps(abort))
        model = {"spec": {"model": {"digest": "sha256:" + "f" * 64}}}
        assert "must name compliance" in rita.refused("patch", "mro", "floor", "--type=merge", "-p", json.dumps(model))
    finally:
        access("annotate", "namespace", access.namespace, "hafnium.dev/required-approvals-")


# --- what a releaser may run ----------------------------------------------------------------------------------------------------------

MONITOR: JSON = {"serviceAccountName": "hafnium-monitoring"}
TOKEN: JSON = {"volumes": [
    {"name": "tmp", "emptyDir": {}},
    {"name": "t", "projected": {"sources": [{"configMap": {"name": "c"}}, {"serviceAccountToken": {"path": "token"}}]}},
]}


@pytest.mark.parametrize(("parts", "words"), [
    ({"predictor": MONITOR}, "spec.service.predictor.serviceAccountName: hafnium-monitoring: models of namespace"),
    ({"transformer": MONITOR}, "spec.service.transformer.serviceAccountName: hafnium-monitoring"),
    ({"explainer": MONITOR}, "spec.service.explainer.serviceAccountName: hafnium-monitoring"),
    ({"predictor": {"serviceAccount": "hafnium-monitoring"}}, "spec.service.predictor.serviceAccount: hafnium-monitoring"),
    ({"predictor": {"serviceAccountName": "default", "serviceAccount": "hafnium-monitoring"}}, ".serviceAccount: hafnium-monitoring"),
    ({"predictor": {"serviceAccountName": "hafnium-rollout-operator"}}, "serviceAccountName: hafnium-rollout-operator"),
    ({"predictor": {"serviceAccountName": "hafnium-models: x"}}, "serviceAccountName: hafnium-models: x: models of"),
    ({"predictor": {"workerSpec": MONITOR}}, "spec.service.predictor.workerSpec.serviceAccountName: hafnium-monitoring"),
    ({"canary": [{"predictor": {}}, {"predictor": MONITOR}]}, "spec.service.canary.predictor.serviceAccountName: hafnium-monitoring"),
    ({"canary": [{"predictor": {"workerSpec": TOKEN}}]}, "canary.predictor.workerSpec: no volume may hold"),
    ({"predictor": {"automountServiceAccountToken": True}}, "spec.service.predictor: automountServiceAccountToken must be false"),
    ({"transformer": {"automountServiceAccountToken": True}}, "spec.service.transformer: automountServiceAccountToken must be false"),
    ({"explainer": {"automountServiceAccountToken": "true"}}, "spec.service.explainer: automountServiceAccountToken must be false"),
    ({"predictor": {"workerSpec": {"automountServiceAccountToken": True}}}, "spec.service.predictor.workerSpec: automount"),
    ({"predictor": TOKEN}, "spec.service.predictor: no volume may hold a projected.serviceAccountToken"),
    ({"transformer": TOKEN}, "spec.service.transformer: no volume may hold a projected.serviceAccountToken"),
    ({"explainer": TOKEN}, "spec.service.explainer: no volume may hold a projected.serviceAccountToken"),
    ({"predictor": {"volumes": "none"}}, "denied"),
], ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "")
def test_a_releaser_runs_no_pod_under_the_account_of_another_part_nor_with_a_token(access: Kubectl, parts: JSON, words: str) -> None:
    """Or a model could write the evidence that it is judged by. On an update as on a creation."""
    rita = access.of("rita@example.com")
    assert words in rita.refused("create", "-f", "-", given=templated(**parts))
    service = templated(**parts)["spec"]["service"]
    assert words in rita.refused("patch", "mro", "unified-risk", "--type=merge", "-p", json.dumps({"spec": {"service": service}}))


@pytest.mark.parametrize("fields", [
    {}, {"serviceAccountName": ""}, {"serviceAccountName": "default"}, {"serviceAccountName": "hafnium-models"},
    {"automountServiceAccountToken": False}, {"volumes": [{"name": "c", "projected": {"sources": [{"configMap": {"name": "c"}}]}}]},
    {"workerSpec": {"serviceAccountName": "hafnium-models"}},
], ids=json.dumps)
def test_a_releaser_runs_models_under_the_account_of_models(access: Kubectl, fields: JSON) -> None:
    access.of("rita@example.com")("create", "--dry-run=server", "-f", "-", given=templated(predictor=fields, transformer=fields))


def test_a_namespace_names_more_accounts_for_models_and_an_abort_is_never_refused(access: Kubectl) -> None:
    rita = access.of("rita@example.com")
    data = templated("wide", predictor={"serviceAccountName": "models-gpu"}, transformer={"serviceAccountName": "hafnium-models"})
    assert "models-gpu: models of namespace" in rita.refused("create", "-f", "-", given=data)
    access("annotate", "namespace", access.namespace, "hafnium.dev/model-accounts=models-gpu, models-other")
    try:
        eventually(lambda: rita.run("create", "--dry-run=server", "-f", "-", given=data).returncode == 0, "the annotation is seen")
        rita("create", "-f", "-", given=data)
        said = rita.refused("create", "-f", "-", given=templated(predictor=MONITOR))
        assert "run under default, hafnium-models, models-gpu, models-other (annotation hafnium.dev/model-accounts" in said
    finally:
        access("annotate", "namespace", access.namespace, "hafnium.dev/model-accounts-")
    eventually(lambda: rita.run("create", "--dry-run=server", "-f", "-", given=data).returncode != 0
               and "models-gpu" in rita.run("create", "--dry-run=server", "-f", "-", given=templated(
                   predictor={"serviceAccountName": "models-gpu"})).stderr, "the annotation's end is seen")
    model = {"spec": {"model": {"digest": "sha256:" + "f" * 64}}}
    assert "models-gpu: models of namespace" in rita.refused("patch", "mro", "wide", "--type=merge", "-p", json.dumps(model))
    abort = {"spec": {"action": {"type": "Abort", "id": "1", "candidateDigest": DIGEST}}}
    rita("patch", "mro", "wide", "--type=merge", "-p", json.dumps(abort))


# --- the operator --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [
    {"spec": {"paused": True}}, {"spec": {"model": {"digest": OTHER}}}, {"metadata": {"labels": {"x": "y"}}},
    {"metadata": {"annotations": {"x": "y"}}},
], ids=json.dumps)
def test_the_operator_never_changes_what_people_asked_for(access: Kubectl, patch: JSON) -> None:
    said = access.account("hafnium-rollout-operator").refused("patch", "mro", "unified-risk", "--type=merge", "-p", json.dumps(patch))
    assert "it writes status and finalizers" in said


def test_the_operator_writes_finalizers_and_status(access: Kubectl) -> None:
    operator = access.account("hafnium-rollout-operator")
    access.run("create", "-f", "-", given=sample("modelrollout") | {"metadata": {"name": "held"}})
    for finalizers in (["hafnium.dev/traffic"], []):
        operator("patch", "mro", "held", "--type=merge", "-p", json.dumps({"metadata": {"finalizers": finalizers}}))
    api = config.new_client_from_config()  # kubectl reads a status before it patches it, which the operator neither does nor may
    api.set_default_header("Impersonate-User", operator.user)
    client.CustomObjectsApi(api).patch_namespaced_custom_object_status(
        "hafnium.dev", "v1alpha1", access.namespace, "modelrollouts", "held", {"status": {"phase": "Pending"}})
    assert access.read("mro", "held")["status"] == {"phase": "Pending"}


# --- evidence -------------------------------------------------------------------------------------------------------------------------


def test_a_monitoring_job_writes_evidence_once(access: Kubectl) -> None:
    job = access.account("hafnium-monitoring")
    job("create", "-f", "-", given=evidence("once"))
    assert "already exists" in job.refused("create", "-f", "-", given=evidence("once"))
    assert "cannot delete" in job.refused("delete", "mev", "once")
    assert "cannot patch" in job.refused("apply", "--server-side", "-f", "-", given=evidence("once"))


@pytest.mark.parametrize("who", ["admin", "another namespace's account", "an approver"])
def test_nobody_else_writes_evidence(access: Kubectl, who: str) -> None:
    if who == "admin":
        assert "evidence is written by monitoring jobs, under a service account of namespace" in access.refused(
            "create", "-f", "-", given=evidence("by-admin"))
    elif who == "an approver":
        assert "cannot create" in access.of("vera@example.com").refused("create", "-f", "-", given=evidence("by-vera"))
    else:
        foreign = "system:serviceaccount:elsewhere:hafnium-monitoring"
        access("apply", "--server-side", "-f", "-", given=role_binding("foreign", "hafnium-monitoring", foreign, role_kind="Role"))
        said = access.account("hafnium-monitoring", "elsewhere").refused("create", "-f", "-", given=evidence("by-foreign"))
        assert "you are system:serviceaccount:elsewhere:hafnium-monitoring" in said


@pytest.mark.parametrize(("patch", "words"), [
    ({"spec": {"verdict": "Fail"}}, "never change"), ({"spec": {"samples": 1}}, "never change"), ({"spec": {"values": []}}, "never change"),
    ({"metadata": {"labels": {"run": "2"}}}, "labels of a record never change"),
    ({"metadata": {"labels": {"run": None}}}, "labels of a record never change"),
    ({"metadata": {"annotations": {"hafnium.dev/note": "2"}}}, "annotations hafnium.dev/… of a record never change"),
    ({"metadata": {"annotations": {"hafnium.dev/note": None}}}, "annotations hafnium.dev/… of a record never change"),
    ({"metadata": {"annotations": {"hafnium.dev/more": "2"}}}, "annotations hafnium.dev/… of a record never change"),
], ids=lambda x: json.dumps(x) if isinstance(x, dict) else "")
def test_evidence_never_changes_not_even_for_the_clusters_admin(access: Kubectl, patch: JSON, words: str) -> None:
    finding = evidence("fixed", labels={"run": "1"}, annotations={"hafnium.dev/note": "1"})
    access.account("hafnium-monitoring").run("create", "-f", "-", given=finding)
    assert words in access.refused("patch", "mev", "fixed", "--type=merge", "-p", json.dumps(patch))


def test_the_operator_removes_evidence_and_neither_writes_nor_changes_any(access: Kubectl) -> None:
    operator = access.account("hafnium-rollout-operator")
    access.account("hafnium-monitoring")("create", "-f", "-", given=evidence("old"))
    assert "cannot create" in operator.refused("create", "-f", "-", given=evidence("by-operator"))
    assert "cannot patch" in operator.refused("patch", "mev", "old", "--type=merge", "-p", '{"spec": {"verdict": "Pass"}}')
    for user in ("rita@example.com", "vera@example.com", "edit@example.com", "view@example.com"):
        assert "cannot delete" in access.of(user).refused("delete", "mev", "old")
    operator("delete", "mev", "old")
    assert "not found" in access.refused("get", "mev", "old")


def test_what_garbage_collection_and_kubectl_need_may_change(access: Kubectl) -> None:
    access.account("hafnium-monitoring")("create", "-f", "-", given=evidence("collected"))
    for metadata in ({"finalizers": ["example.com/hold"]}, {"finalizers": []}, {"annotations": {"example.com/seen": "yes"}}):
        access("patch", "mev", "collected", "--type=merge", "-p", json.dumps({"metadata": metadata}))
    access("delete", "mev", "collected")


def test_policies_compile_without_a_warning(access: Kubectl) -> None:
    """The API server checks expressions against the types that it knows; what it can't understand it would refuse at run time."""
    found = [p for p in access.read("validatingadmissionpolicies")["items"] if p["metadata"]["name"].endswith(access.namespace)]
    assert len(found) == 7
    eventually(lambda: all(
        "typeChecking" in access.read("validatingadmissionpolicy", p["metadata"]["name"]).get("status", {}) for p in found), "type checks")
    for p in found:
        status = access.read("validatingadmissionpolicy", p["metadata"]["name"])["status"]
        assert status["typeChecking"] == {}, p["metadata"]["name"]
