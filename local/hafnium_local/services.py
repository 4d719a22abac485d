"""An InferenceService → the processes that serve it on this machine.

What KServe's controller does, done here as it does it: the predictor by its runtime, the transformer as a container to which
`--model_name --predictor_host --http_port` are appended when absent, `$(NAME)` in arguments expanded from the container's
environment. What differs: an image can't be run, so Hafnium's own images become `python -m …` of the same code, and any other
container needs a `command`; and since all services share one address, ports are chosen here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from hafnium_contract.bundle import Bundle, open_bundle
from hafnium_contract.errors import HafniumError
from hafnium_contract.wire import DIGEST_LABEL, VERSION_LABEL
from hafnium_local.faults import FaultOptionsError, parse_fault
from hafnium_local.manifest_writer import FAULT_ANNOTATION, FAULT_OPTIONS_ANNOTATION
from hafnium_local.manifests import Manifest, ManifestError
from hafnium_local.ports import Ports, is_free
from hafnium_local.probes import Probe
from hafnium_local.processes import ProcessSpec, merged, python_module

HOST = "127.0.0.1"
READY_PATH = "/v2/health/ready"
RUNTIME = "hafnium-onnx"
_MODULES = {"hafnium-predictor": "hafnium_predictor", "hafnium-transformer": "hafnium_transformer"}
_VARIABLE = re.compile(r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")
Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class ServicePlan:
    """What runs for one InferenceService. `port` is where the gateway sends requests."""

    name: str
    revision: str
    """Digest of everything that makes a difference: another revision means other processes."""
    model_name: str
    model_version: str
    model_digest: str
    """`sha256:…` from the bundle's manifest; empty for a custom predictor."""
    processes: tuple[ProcessSpec, ...]
    """In the order of their start."""
    port: int
    predictor_port: int
    health_path: str | None
    port_keys: tuple[str, ...]


def revision_of(manifest: Manifest) -> str:
    """8 hex digits over the spec and the annotations that the local runtime reads."""
    local = {k: v for k, v in manifest.annotations.items() if k.startswith("local.hafnium.dev/")}
    text = json.dumps([manifest.data.get("spec"), local], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def plan_service(manifest: Manifest, ports: Ports, state: Path) -> ServicePlan:
    """The processes of an InferenceService. Raises ManifestError (with line) for what can't run on one machine.

    Opening the bundle checks every hash, so a changed or incomplete bundle is an error here and not a server that never comes up.
    """
    return _Planner(manifest, ports, state).plan()


class _Planner:
    def __init__(self, manifest: Manifest, ports: Ports, state: Path) -> None:
        self.manifest = manifest
        self.name = manifest.name
        self.state = state
        self.revision = revision_of(manifest)
        self.keys: list[str] = []
        self._ports = ports

    def plan(self) -> ServicePlan:
        spec = cast(dict[str, Any], self.manifest.data["spec"])
        for part in ("explainer", "canary"):
            if spec.get(part):
                raise self.error(("spec", part), f"{part} can't run on one machine; use a ModelRollout for a canary")
        predictor_port = self.port("predictor")
        bundle, predictor, predictor_port = self.predictor(cast(dict[str, Any], spec["predictor"]), predictor_port)
        processes = [predictor]
        if spec.get("transformer"):
            processes.append(self.transformer(cast(dict[str, Any], spec["transformer"]), predictor_port))
        front = cast(Probe, processes[-1].probe)
        fault = self.fault(front.port)
        if fault is not None:
            processes.append(fault)
            front = cast(Probe, fault.probe)
        return ServicePlan(
            name=self.name, revision=self.revision,
            model_name=bundle.manifest.model_name if bundle else self.name,
            model_version=bundle.manifest.model_version if bundle else self.manifest.labels.get(VERSION_LABEL, ""),
            model_digest=bundle.manifest.digest if bundle else "",
            processes=tuple(processes), port=front.port, predictor_port=predictor_port, health_path=front.path,
            port_keys=tuple(self.keys),
        )

    def error(self, path: Path_, message: str) -> ManifestError:
        return ManifestError([self.manifest.problem(path, message)])

    def port(self, role: str) -> int:
        key = f"{self.name}@{self.revision}/{role}"
        self.keys.append(key)
        return self._ports.get(key)

    def predictor(self, part: dict[str, Any], port: int) -> tuple[Bundle | None, ProcessSpec, int]:
        path: Path_ = ("spec", "predictor")
        model = cast("dict[str, Any] | None", part.get("model"))
        if model is None:
            containers = part.get("containers")
            if not containers:
                raise self.error(path, "expected `model` (an ONNX bundle) or `containers` with a command")
            container, where = self.container(part, path)
            process = self.custom(container, where, "predictor", port, append={})
            return None, process, cast(Probe, process.probe).port
        where = (*path, "model")
        format_name = cast(dict[str, Any], model["modelFormat"]).get("name")
        if format_name != "onnx":
            raise self.error((*where, "modelFormat", "name"), f"expected onnx, the format of a Hafnium bundle, got {format_name!r}")
        if model.get("runtime", RUNTIME) != RUNTIME:
            raise self.error((*where, "runtime"), f"expected {RUNTIME}, the runtime on one machine, got {model['runtime']!r}")
        bundle = self.bundle(model, where)
        environment = self.environment(model, where)
        options = {
            "--model_name": self.name, "--model_dir": str(bundle.path), "--http_port": str(port),
            "--grpc_port": str(self.port("predictor-grpc")), "--host": HOST,
        }
        given = self.arguments(model, where, environment)
        argv = python_module("hafnium_predictor", *_without(given, set(options)), *(x for kv in options.items() for x in kv))
        return bundle, self.process("predictor", argv, environment, Probe(HOST, port, READY_PATH), model), port

    def bundle(self, model: dict[str, Any], where: Path_) -> Bundle:
        for other in ("storage", "storageUris"):
            if model.get(other):
                raise self.error((*where, other), "one machine reads bundles from storageUri: file:///path/of/the/bundle only")
        uri = model.get("storageUri")
        if not isinstance(uri, str):
            raise self.error((*where, "storageUri"), "required here: file:///path/of/the/bundle")
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise self.error(
                (*where, "storageUri"),
                f"expected file:///absolute/path/of/a/bundle, got {uri!r}; copy a bundle from elsewhere to this machine first",
            )
        try:
            bundle = open_bundle(Path(unquote(parts.path)))
        except HafniumError as e:
            raise self.error((*where, "storageUri"), str(e)) from e
        wanted = self.manifest.labels.get(DIGEST_LABEL)
        if wanted is not None and wanted != bundle.digest8:
            raise self.error(
                ("metadata", "labels", DIGEST_LABEL), f"says {wanted}, but the bundle at {bundle.path} has digest {bundle.digest8}"
            )
        return bundle

    def transformer(self, part: dict[str, Any], predictor_port: int) -> ProcessSpec:
        container, where = self.container(part, ("spec", "transformer"))
        append = {"--model_name": self.name, "--predictor_host": f"{HOST}:{predictor_port}"}
        if container.get("command"):
            return self.custom(container, where, "transformer", self.port("transformer"), append=append)
        module = _MODULES.get(_image_name(str(container.get("image", ""))))
        if module != "hafnium_transformer":
            raise self.error(
                (*where, "image"),
                f"image {container.get('image')!r} can't be run without a container runtime; use a hafnium-transformer image, "
                "or say under `command` how the program is started on this machine",
            )
        environment = self.environment(container, where)
        given = self.arguments(container, where, environment)
        port = self.port("transformer")
        ours = {"--http_port": str(port), "--grpc_port": str(self.port("transformer-grpc")), "--host": HOST}
        given = _without(given, set(ours))
        append["--inference_log"] = str(self.state / "inference-log" / self.name)
        argv = python_module(module, *_appended(given, append), *(x for kv in ours.items() for x in kv))
        return self.process("transformer", argv, environment, Probe(HOST, port, READY_PATH), container)

    def container(self, part: dict[str, Any], path: Path_) -> tuple[dict[str, Any], Path_]:
        containers = cast(list[dict[str, Any]], part.get("containers") or [])
        if len(containers) != 1:
            raise self.error(
                (*path, "containers"), f"expected one container, got {len(containers)}; sidecars don't run on one machine"
            )
        if part.get("initContainers"):
            raise self.error((*path, "initContainers"), "init containers don't run on one machine")
        return containers[0], (*path, "containers", 0)

    def custom(self, container: dict[str, Any], where: Path_, role: str, port: int, *, append: dict[str, str]) -> ProcessSpec:
        """A container with a command. It hears its port as `--http_port`, as `$PORT` and as `$(PORT)` in its arguments."""
        command = cast("list[str] | None", container.get("command"))
        if not command:
            raise self.error(
                where,
                f"container {container.get('name')!r} needs a `command`: an image can't be run here without a container runtime",
            )
        declared = cast("list[dict[str, Any]]", container.get("ports") or [])
        fixed = declared[0].get("containerPort") if declared else None
        if isinstance(fixed, int):
            port = fixed  # the program listens where it wants: it was written for an address of its own
        environment = {**self.environment(container, where), "PORT": str(port)}
        line = [_expand(x, environment) for x in command] + self.arguments(container, where, environment)
        if not isinstance(fixed, int):
            append = {**append, "--http_port": str(port)}
        probe = _readiness(container, port)
        return self.process(role, tuple(_appended(line, append)), environment, probe, container)

    def fault(self, upstream: int) -> ProcessSpec | None:
        kind = self.manifest.annotations.get(FAULT_ANNOTATION)
        if kind is None:
            return None
        path = ("metadata", "annotations", FAULT_ANNOTATION)
        try:
            fault = parse_fault(kind, self.manifest.annotations.get(FAULT_OPTIONS_ANNOTATION, "{}"))
        except FaultOptionsError as e:
            raise self.error(path, str(e)) from e
        port = self.port("fault")
        argv = python_module("hafnium_local.faults", "--listen", str(port), "--upstream", f"{HOST}:{upstream}", *fault.arguments())
        return self.process("fault", argv, {}, Probe(HOST, port, READY_PATH), {})

    def process(
        self, role: str, argv: tuple[str, ...], environment: Mapping[str, str], probe: Probe, container: Mapping[str, Any]
    ) -> ProcessSpec:
        cwd = container.get("workingDir")
        return ProcessSpec(
            name=f"{self.name}-{role}", argv=argv, env=merged(environment, {"INFERENCE_SERVICE_NAME": self.name}), probe=probe,
            cwd=cwd if isinstance(cwd, str) else None,
        )

    def environment(self, container: Mapping[str, Any], where: Path_) -> dict[str, str]:
        if container.get("envFrom"):
            raise self.error(
                (*where, "envFrom"), "ConfigMaps and Secrets don't exist on one machine; list the variables under `env`"
            )
        out: dict[str, str] = {}
        for i, item in enumerate(cast(list[dict[str, Any]], container.get("env") or [])):
            name = str(item["name"])
            source = cast("dict[str, Any] | None", item.get("valueFrom"))
            if source is None:
                out[name] = _expand(str(item.get("value") or ""), out)
                continue
            field = cast(dict[str, Any], source.get("fieldRef") or {}).get("fieldPath")
            known = {"metadata.name": self.name, "metadata.namespace": "local", "status.podIP": HOST, "status.hostIP": HOST}
            reference = cast(dict[str, Any], source.get("secretKeyRef") or source.get("configMapKeyRef") or {})
            value = known.get(str(field)) if field else os.environ.get(name)
            if value is not None:
                out[name] = value
            elif not reference.get("optional"):
                raise self.error(
                    (*where, "env", i),
                    f"{name}: its source doesn't exist on one machine; set {name} in the environment of `hafnium up`",
                )
        return out

    def arguments(self, container: Mapping[str, Any], where: Path_, environment: Mapping[str, str]) -> list[str]:
        return [_expand(x, environment) for x in cast(list[str], container.get("args") or [])]


def taken_ports(plan: ServicePlan) -> list[int]:
    """Ports of the plan on which something else listens now."""
    ports = {p.probe.port for p in plan.processes if p.probe is not None}
    return sorted(p for p in ports if not is_free(p))


def _readiness(container: Mapping[str, Any], port: int) -> Probe:
    """The container's readinessProbe; without one, accepting a connection is being ready."""
    probe = cast(dict[str, Any], container.get("readinessProbe") or {})
    http = cast("dict[str, Any] | None", probe.get("httpGet"))
    timeout = probe.get("timeoutSeconds")
    return Probe(HOST, port, str(http.get("path") or "/") if http is not None else None, timeout_s=float(timeout or 2))


def _image_name(image: str) -> str:
    return image.split("@")[0].rpartition("/")[2].partition(":")[0]


def _expand(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)` → its value, `$$` → `$`; an unknown name stays as it is. Kubernetes' own rules."""
    def value(found: re.Match[str]) -> str:
        return "$" if found.group(1) == "$" else environment.get(found.group(2), found.group(0))
    return _VARIABLE.sub(value, text)


def _has(arguments: list[str], option: str) -> bool:
    return any(a == option or a.startswith(f"{option}=") for a in arguments)


def _appended(arguments: list[str], options: Mapping[str, str]) -> list[str]:
    out = list(arguments)
    for option, value in options.items():
        if not _has(arguments, option):
            out += [option, value]
    return out


def _without(arguments: list[str], options: set[str]) -> list[str]:
    """Arguments without these options and their values, which the runtime decides."""
    out: list[str] = []
    skip = False
    for a in arguments:
        if skip:
            skip = False
        elif a in options:
            skip = True
        elif a.partition("=")[0] not in options:
            out.append(a)
    return out
