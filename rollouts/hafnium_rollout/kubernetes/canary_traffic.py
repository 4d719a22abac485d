"""The backend CanaryTrafficPercent: one InferenceService in Knative mode, whose revisions are the arms. Pure.

KServe keeps no name for a model, only templates and revisions, and every change of a template is a revision. So each template carries
its model's digest in its components' annotations (it becomes the revision's), and an arm is named as everywhere, `<name>-<digest8>`;
a template without a digest, written by a person, is the arm `<name>`.

Measured (facts of KServe 0.20 on Knative 1.21) and kept to here:
- a changed template without the percent takes all requests as soon as it is ready: template and percent go in one write, and the
  percent is 0 at first, since "latest ready" may still be another one;
- 0 gives all requests to the revision that was rolled out before; the field removed after that brings the bad one back: so the
  stable template is put back *together with* 0, and the field goes only when that template's own revision is ready;
- 0 after a full rollout takes a second reconcile until the old revision is named: the template is put back only after that;
- transformer and predictor draw their revisions independently; both get the same percent, and what is live counts only where they agree.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

from hafnium_contract.wire import DIGEST_LABEL
from hafnium_rollout.kubernetes.kinds import Json
from hafnium_rollout.kubernetes.objects_seen import (
    DIGEST_ANNOTATION,
    PodSeen,
    components,
    condition,
    dig,
    meta_of,
    other_manager,
    ours_alone,
    revision_of,
    rows,
    texts,
    want_of_room,
)
from hafnium_rollout.kubernetes.paired_services import MODE_ANNOTATION
from hafnium_rollout.local_backend import inference_service
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.observation import FOREIGN, LiveRoute, RouteSeen, ServiceSeen
from hafnium_rollout.status import ModelSeen

PERCENT = "canaryTrafficPercent"
MODE = "Knative"


def arm_of(rollout: ModelRollout, digest: str) -> str:
    """An arm's name: by its digest, or the InferenceService's own where there is none."""
    return rollout.service_name(digest) if digest else rollout.name


def template_digest(item: Json) -> str:
    """Digest that the spec's template carries; empty when its components don't all carry the same."""
    found = {texts(item, "spec", c, "annotations").get(DIGEST_ANNOTATION, "") for c in components(item)}
    return found.pop() if len(found) == 1 else ""


def percent_of(item: Json) -> int | None:
    """The percent that all components have; None without one. −1: they differ, which is nobody's intent."""
    found = {dig(item, "spec", c, PERCENT) for c in components(item)}
    if len(found) != 1:
        return -1
    value = found.pop()
    return value if isinstance(value, int) else None


def model_spec(rollout: ModelRollout, model: ModelSeen, template: Mapping[str, Any]) -> Json:
    """The template of one model, with its bundle and its digest in every component."""
    spec = cast("Json", inference_service(rollout, model, template)["spec"])
    for component in components({"spec": spec}):
        part = cast("Json", spec[component])
        part["annotations"] = {**texts(part, "annotations"), DIGEST_ANNOTATION: model.digest}
        part["labels"] = {**texts(part, "labels"), DIGEST_LABEL: model.digest.removeprefix("sha256:")[:8]}
    return with_percent(spec, None)


def with_percent(spec: Json, percent: int | None) -> Json:
    """The spec with the percent in every component, or in none."""
    out = copy.deepcopy(spec)
    for component in components({"spec": out}):
        cast("Json", out[component]).pop(PERCENT, None)
        if percent is not None:
            cast("Json", out[component])[PERCENT] = percent
    return out


def new_service(rollout: ModelRollout, namespace: str, spec: Json) -> Json:
    """The InferenceService, for a rollout whose model is the first."""
    return {"metadata": {"name": rollout.name, "namespace": namespace, "annotations": {MODE_ANNOTATION: MODE}}, "spec": spec}


def replaced(item: Json, spec: Json) -> Json:
    """The object with another spec, for an update that carries the resourceVersion which was read."""
    kept = {k: v for k, v in item["metadata"].items() if k != "managedFields"}
    return {"metadata": kept, "spec": spec}


def revision_digests(revisions: Sequence[Json]) -> dict[str, str]:
    """Revision → digest of the model in it."""
    return {meta_of(r).name: meta_of(r).annotations.get(DIGEST_ANNOTATION, "") for r in revisions}


def route_of(rollout: ModelRollout, item: Json, stable: str, wanted: str | None) -> RouteSeen:
    """What the spec intends. A candidate's template at 0 is dark: no candidate. `wanted`: the arm that is to have a share.

    Is another's template in its place, at the 0 % that we wrote, nobody took its share: what is to be told is the template.
    """
    arm, percent = arm_of(rollout, template_digest(item)), percent_of(item)
    manager, revision = other_manager(item), revision_of(item)
    if percent == -1:
        return RouteSeen(FOREIGN, None, 0, False, manager, revision=revision)
    if not stable or arm == stable:
        return RouteSeen(arm, None, 0, False, manager, revision=revision)
    weight = 100 if percent is None else percent
    dark = weight == 0 and wanted is not None and all(ours_alone(item, c, PERCENT) for c in components(item))
    if dark and arm != wanted:
        return RouteSeen(FOREIGN, None, 0, False, manager, revision=revision)
    return RouteSeen(stable, arm if weight else None, weight, False, manager, revision=revision, dark=dark)


def live_of(rollout: ModelRollout, item: Json, digests: Mapping[str, str]) -> tuple[LiveRoute | None, str]:
    """Where requests go by Knative's word, and why that isn't known."""
    found: dict[str, dict[str, int]] = {}
    for component in components(item):
        weights: dict[str, int] = {}
        for target in rows(item, "status", "components", component, "traffic"):
            revision, percent = str(target.get("revisionName") or ""), int(target.get("percent") or 0)
            if percent and revision not in digests:
                return None, f"revision {revision or '(unnamed)'} of {component} isn't known yet"
            if percent:
                arm = arm_of(rollout, digests[revision])
                weights[arm] = weights.get(arm, 0) + percent
        if sum(weights.values()) != 100:
            return None, f"Knative doesn't say yet where the {component}'s requests go"
        found[component] = weights
    if not found:
        return None, "the InferenceService has no component"
    first = next(iter(found.values()))
    if any(w != first for w in found.values()):
        return None, "transformer and predictor don't have the same split yet: " + ", ".join(f"{c} {w}" for c, w in found.items())
    return LiveRoute(first), ""


def latest_is_ready(item: Json, digests: Mapping[str, str], digest: str) -> bool:
    """The newest revision of every component is ready, and is of this model."""
    parts = [dig(item, "status", "components", c) for c in components(item)]
    return bool(parts) and all(
        isinstance(p, dict) and p.get("latestCreatedRevision") and p.get("latestCreatedRevision") == p.get("latestReadyRevision")
        and digests.get(str(p["latestReadyRevision"])) == digest for p in parts)


def under_way(item: Json) -> str:
    """What is going on at an InferenceService that nobody rolls out here; empty when it is at rest: one revision answers everything.

    Who takes it over in between would take a half-done change of somebody else's for the stable model, and undo or finish it unasked.
    """
    for component in components(item):
        percent = dig(item, "spec", component, PERCENT)
        if percent is not None:
            return f"{PERCENT} of its {component} is {percent}"
        part = dig(item, "status", "components", component)
        created, ready = dig(part, "latestCreatedRevision"), dig(part, "latestReadyRevision")
        if not created or created != ready:
            return f"the newest revision of its {component} ({created or 'none yet'}) isn't ready"
        shares = {str(t.get("revisionName") or ""): int(t.get("percent") or 0) for t in rows(part, "traffic")}
        answering = sorted(name for name, share in shares.items() if share)
        if answering != [created]:
            return f"its {component}'s requests go to {', '.join(answering) or 'no revision'}, and not to the newest ({created}) alone"
    return ""


def rolled_out(rollout: ModelRollout, item: Json, digests: Mapping[str, str]) -> frozenset[str]:
    """Arms that a percent of 0 gives all requests to: one, or several while components differ."""
    names = [str(dig(item, "status", "components", c, "latestRolledoutRevision") or "") for c in components(item)]
    return frozenset(arm_of(rollout, digests[n]) if n in digests else "" for n in names)


def services_of(
    rollout: ModelRollout, item: Json, revisions: Sequence[Json], pods: Sequence[PodSeen], models: Sequence[ModelSeen],
) -> dict[str, ServiceSeen]:
    """Each arm as if it were a service of its own."""
    digests = revision_digests(revisions)
    out: dict[str, ServiceSeen] = {}
    known = {m.service: m for m in models}
    for arm in sorted({arm_of(rollout, d) for d in digests.values()} | {arm_of(rollout, template_digest(item))}):
        mine = [r for r in revisions if arm_of(rollout, digests[meta_of(r).name]) == arm]
        digest = next((digests[meta_of(r).name] for r in mine), template_digest(item))
        newest = arm == arm_of(rollout, template_digest(item))
        ready = latest_is_ready(item, digests, digest) if newest else any(condition(r, "Ready") != "False" for r in mine)
        its_pods = [p for p in pods if digests.get(p.revision) == digest]
        said = [p.message for p in its_pods if p.message] + [
            str(c.get("message")) for r in mine for c in rows(r, "status", "conditions")
            if c.get("type") == "Ready" and c.get("status") != "True" and c.get("message")]
        model = known.get(arm)
        out[arm] = ServiceSeen(
            arm, digest, ready, max((p.restarts for p in its_pods), default=0), version=model.version if model is not None else "",
            message="" if ready else ("; ".join(said)[:500] or "its revision is not ready"),
            pod_restarts={p.name: p.restarts for p in its_pods if p.restarts}, no_room=want_of_room(ready, components(item), its_pods),
            storage_uri=str(dig(item, "spec", "predictor", "model", "storageUri") or "") if newest else "")
    return out
