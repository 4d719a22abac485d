"""The YAML that `kubectl apply -f` takes, read and checked for one machine.

InferenceServices are checked against KServe's schema (kserve_schema.py), ModelRollouts and ModelApprovals against the operator's
types. Kinds
that mean nothing here (a Namespace, a PriorityClass) are ignored with a line that says so; any other kind is an error, because
applying half of a file in silence is worse than applying nothing. Nothing is applied before every file is fine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from hafnium_contract.contract_file import line_of
from hafnium_contract.errors import HafniumError, InputError, Problem
from hafnium_contract.whole_files import write_atomically
from hafnium_local.kserve_schema import SERVICE_SPEC_CLASS, dotted, problems_of

BYTES_MAX = 4 * 1024 * 1024
DOCUMENTS_MAX = 1_000
VALUES_MAX = 50_000
"""Values in one document. YAML aliases can make a small file a huge tree; a real InferenceService has some hundred."""
INFERENCE_SERVICE = "InferenceService"
MODEL_ROLLOUT = "ModelRollout"
MODEL_APPROVAL = "ModelApproval"
KINDS = {
    INFERENCE_SERVICE: "serving.kserve.io/v1beta1", MODEL_ROLLOUT: "hafnium.dev/v1alpha1", MODEL_APPROVAL: "hafnium.dev/v1alpha1",
}
IGNORED = frozenset({
    "Namespace", "ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "HTTPRoute", "Gateway",
    "GatewayClass", "NetworkPolicy", "PodDisruptionBudget", "HorizontalPodAutoscaler", "PriorityClass", "ResourceQuota",
    "LimitRange", "ServiceMonitor", "PodMonitor", "PrometheusRule", "CustomResourceDefinition", "ServingRuntime",
    "ClusterServingRuntime", "ClusterStorageContainer", "PersistentVolume", "PersistentVolumeClaim", "Ingress", "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding", "Service",
})
"""Kinds that only say how a cluster isolates, scales, exposes or watches what runs: one machine has no use for them."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


class ManifestError(HafniumError):
    """Manifests are not as they should be. `problems` holds (file, Problem) of all of them."""

    exit_status = 2

    def __init__(self, problems: Sequence[tuple[str, Problem]]) -> None:
        self.problems = tuple(problems)
        lines = [f"  {source}:{p.line or 1}: {f'{p.path}: ' if p.path else ''}{p.message}" for source, p in self.problems]
        super().__init__(f"{len(lines)} problem{'s' if len(lines) != 1 else ''}; nothing was applied\n" + "\n".join(lines))


@dataclass(frozen=True)
class Manifest:
    """One object as it was written. `line` is where its document begins."""

    kind: str
    name: str
    data: dict[str, Any]
    source: str
    line: int
    node: yaml.Node | None = None

    def problem(self, path: tuple[str | int, ...], message: str) -> tuple[str, Problem]:
        """A problem at `path` of this object, with the line of the deepest part of it that exists."""
        return self.source, Problem(dotted(path), message, line_of(self.node, path) or self.line)

    @property
    def annotations(self) -> dict[str, str]:
        return cast(dict[str, str], self.data["metadata"].get("annotations") or {})

    @property
    def labels(self) -> dict[str, str]:
        return cast(dict[str, str], self.data["metadata"].get("labels") or {})

    @property
    def file_name(self) -> str:
        return f"{self.kind}-{self.name}.yaml"


@dataclass(frozen=True)
class Manifests:
    """What a set of files holds: `objects` in order, and one line for each document that was `ignored`."""

    objects: tuple[Manifest, ...]
    ignored: tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves dates as text, as Kubernetes does (there is no date in JSON)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_manifests(files: Sequence[Path]) -> Manifests:
    """Reads and checks files, and the *.yaml, *.yml and *.json of folders. Raises InputError or ManifestError with all problems."""
    objects: list[Manifest] = []
    ignored: list[str] = []
    problems: list[tuple[str, Problem]] = []
    for file in _expanded(files):
        try:
            for manifest in _documents(file):
                if manifest.kind in IGNORED:
                    ignored.append(f"{manifest.source}:{manifest.line}: {manifest.kind} {manifest.name or '(no name)'}: ignored, "
                                   "it means nothing on one machine")
                    continue
                problems += check(manifest)
                objects.append(manifest)
        except ManifestError as e:
            problems += e.problems
    seen: dict[tuple[str, str], Manifest] = {}
    for m in objects:
        before = seen.setdefault((m.kind, m.name), m)
        if before is not m:
            where = f"{before.source}:{before.line}"
            problems.append(m.problem(("metadata", "name"), f"{m.kind} {m.name!r} was given already, at {where}"))
    if problems:
        raise ManifestError(problems)
    return Manifests(tuple(objects), tuple(ignored))


def read_object(file: Path) -> Manifest:
    """One stored object (`objects/<kind>-<name>.yaml`), checked as it was when it was applied."""
    found = read_manifests([file]).objects
    if len(found) != 1:
        raise InputError(f"{file}: expected one object, found {len(found)}")
    return found[0]


def _expanded(files: Sequence[Path]) -> list[Path]:
    out: list[Path] = []
    for file in files:
        if file.is_dir():
            inside = sorted(p for p in file.iterdir() if p.suffix in (".yaml", ".yml", ".json") and p.is_file())
            if not inside:
                raise InputError(f"{file}: no *.yaml, *.yml or *.json file in this folder")
            out += inside
        else:
            out.append(file)
    return out


def _documents(file: Path) -> Iterator[Manifest]:
    try:
        if file.stat().st_size > BYTES_MAX:
            raise InputError(f"{file}: larger than {BYTES_MAX} bytes; is it a manifest?")
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(f"{file}: can't be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: not UTF-8 text (byte {e.start})") from e
    source = str(file)
    loader = _Loader(text)
    try:
        for _ in range(DOCUMENTS_MAX):
            if not loader.check_node():
                return
            node = loader.get_node()
            if node is None:
                continue
            wrong = _form_problem(node)
            if wrong is not None:
                raise ManifestError([(source, wrong)])
            data: Any = cast(Any, loader).construct_document(node)
            if data is not None:
                yield from _objects(data, node, source, node.start_mark.line + 1)
        raise InputError(f"{file}: more than {DOCUMENTS_MAX} documents")
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        raise ManifestError([(source, Problem("", f"not YAML: {e.problem or e}", mark.line + 1 if mark else None))]) from e
    except (yaml.YAMLError, RecursionError) as e:
        raise ManifestError([(source, Problem("", f"not YAML: {e}"))]) from e
    finally:
        loader.dispose()


def _objects(data: Any, node: yaml.Node, source: str, line: int) -> Iterator[Manifest]:
    """The document's object, or the items of a `kind: List`."""
    if not isinstance(data, dict):
        message = f"expected an object with apiVersion, kind and metadata, got {type(data).__name__}"
        raise ManifestError([(source, Problem("", message, line))])
    fields = cast(dict[str, Any], data)
    items = fields.get("items")
    if fields.get("kind") == "List" and isinstance(items, list):
        nodes = next((v for k, v in cast(Any, node).value if k.value == "items"), None)
        for i, item in enumerate(cast(list[Any], items)):
            inner = cast("yaml.Node", nodes.value[i]) if isinstance(nodes, yaml.SequenceNode) else node
            yield from _objects(item, inner, source, inner.start_mark.line + 1)
        return
    metadata = fields.get("metadata")
    name = cast(dict[str, Any], metadata).get("name") if isinstance(metadata, dict) else None
    yield Manifest(str(fields.get("kind") or ""), name if isinstance(name, str) else "", fields, source, line, node)


def _form_problem(root: yaml.Node) -> Problem | None:
    """What YAML allows and a manifest must not have: a key written twice (the last wins in silence), aliases without an end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Values below a node with all aliases written out."""
        if id(node) not in sizes:
            sizes[id(node)] = VALUES_MAX  # what it has while it is counted: an alias of itself has no end
            sizes[id(node)] = min(VALUES_MAX, 1 + sum(size(child) for child in _children(node)))
        return sizes[id(node)]

    if size(root) >= VALUES_MAX:
        return Problem("", f"{VALUES_MAX} values or more in one document; is a YAML alias repeated?", root.start_mark.line + 1)
    todo = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                text = str(key.value)
                if text in keys and text != "<<":
                    return Problem(text, "this key is written twice in one mapping", key.start_mark.line + 1)
                keys.add(text)
        todo += _children(node)
    return None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def check(manifest: Manifest) -> list[tuple[str, Problem]]:
    """All problems of one object's form."""
    wanted = KINDS.get(manifest.kind)
    if wanted is None:
        known = ", ".join(KINDS)
        return [manifest.problem(("kind",), f"kind {manifest.kind!r} can't run on one machine; known here: {known}")]
    version = manifest.data.get("apiVersion")
    if version != wanted:
        return [manifest.problem(("apiVersion",), f"expected {wanted} for a {manifest.kind}, got {version!r}")]
    out: list[tuple[str, Problem]] = []
    if not _NAME.fullmatch(manifest.name):
        out.append(manifest.problem(
            ("metadata", "name"), f"expected a DNS label (lower-case letters, digits and -, at most 63), got {manifest.name!r}"
        ))
    if manifest.kind == INFERENCE_SERVICE:
        if not isinstance(manifest.data.get("spec"), dict):
            out.append(manifest.problem(("spec",), "required field is missing (V1beta1InferenceServiceSpec)"))
        return out + [manifest.problem(path, message) for path, message in problems_of(manifest.data)]
    return out + (_rollout_problems(manifest) if manifest.kind == MODEL_ROLLOUT else _approval_problems(manifest))


def _rollout_problems(manifest: Manifest) -> list[tuple[str, Problem]]:
    """By the operator's own types; its service template by KServe's, which the operator leaves to the API server."""
    from hafnium_rollout.errors import RolloutFileError  # only here: a machine that serves one model needs no operator
    from hafnium_rollout.objects import parse_rollout

    out: list[tuple[str, Problem]] = []
    try:
        parse_rollout(manifest.data, manifest.source, manifest.node)
    except RolloutFileError as e:
        out += [(manifest.source, p) for p in e.problems]
    spec: Any = manifest.data.get("spec")
    service: Any = cast(dict[str, Any], spec).get("service") if isinstance(spec, dict) else None
    if isinstance(service, dict):
        found = problems_of(cast(Any, service), SERVICE_SPEC_CLASS)
        out += [manifest.problem(("spec", "service", *path), message) for path, message in found]
    return out


def _approval_problems(manifest: Manifest) -> list[tuple[str, Problem]]:
    from hafnium_rollout.objects import ModelApproval

    try:
        ModelApproval.model_validate(manifest.data)
    except ValidationError as e:
        return [manifest.problem(x["loc"], x["msg"]) for x in e.errors()]
    return []


def store(manifests: Iterable[Manifest], folder: Path) -> list[Path]:
    """Writes each object into the folder of wanted objects, atomically; one that is there already in the same form is left alone.

    Returns the files that changed. Raises InputError when the folder can't be written.
    """
    changed: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for m in manifests:
            file = folder / m.file_name
            text = yaml.safe_dump(json.loads(json.dumps(m.data)), sort_keys=False, allow_unicode=True)
            if file.is_file() and file.read_text(encoding="utf-8") == text:
                continue
            write_atomically(file, text)
            changed.append(file)
    except OSError as e:
        raise InputError(f"{folder}: can't be written: {e.strerror}") from e
    return changed
