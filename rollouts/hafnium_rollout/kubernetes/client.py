"""The API server, as few verbs as are needed: get, list, watch, apply, status, create, update, delete.

A thin layer over the `kubernetes` package, which brings credentials and TLS. What it adds: a limit on everything (time, bytes,
objects, retries), errors as types (errors.py), and a fence that is asked before every single write that leaves the process,
retries too: who has lost the lease in the middle of a retry must not write.

Retried, within a budget: 429, 500, 502, 503, 504 and broken connections. Every write here may be repeated: an apply is idempotent,
an update or a delete carries a resourceVersion, a create that comes twice is a Conflict. A Conflict is never retried here: whoever
wrote in between knew something that the caller didn't, so the caller has to look again.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlencode

import urllib3
from kubernetes import client as k8s
from kubernetes import config as k8s_config
from kubernetes.config.config_exception import ConfigException

from hafnium_contract.errors import InputError
from hafnium_rollout.kubernetes.errors import KubernetesError, NotFound, Unavailable, Unreadable, error_type
from hafnium_rollout.kubernetes.kinds import EVENT, FIELD_MANAGER, Json, Kind

Fence = Callable[[], None]
"""Asked right before each write; raises LeaseLost when this process may not write."""
_RETRIED = (429, 500, 502, 503, 504)
_UNDECLARED = "field not declared in schema"
_METHODS = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one call."""

    connect_timeout_s: float = 3.0
    """The API server is near: who doesn't take a connection by then is down."""
    read_timeout_s: float = 10.0
    """Longest silence within an answer. A webhook may take 10 s (KServe's are given that)."""
    call_deadline_s: float = 20.0
    """A call with all its retries and waits. Beyond it the loop's next look is the better retry."""
    attempts_max: int = 4
    backoff_first_s: float = 0.2
    """Wait before the second attempt, doubled after that, each drawn between half and all of it. Retry-After goes before it."""
    answer_bytes_max: int = 64 * 1024 * 1024
    """One page of 500 objects of 100 kB each."""
    page_objects_max: int = 500
    list_objects_max: int = 20_000
    """All pages together. Beyond it the list is refused, not cut: a part would look like the whole."""


class RetryBudget:
    """Retries as a share of calls, so that a struggling API server isn't asked twice by everybody. Safe between threads."""

    def __init__(self, share: float = 0.2, spare: float = 20.0) -> None:
        self._share, self._spare, self._left = share, spare, spare
        self._lock = threading.Lock()

    def called(self) -> None:
        with self._lock:
            self._left = min(self._spare, self._left + self._share)

    def take(self) -> bool:
        with self._lock:
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True


@dataclass(frozen=True, slots=True)
class ObjectList:
    items: tuple[Json, ...]
    resource_version: str
    """A watch goes on from here."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    type: str
    """ADDED, MODIFIED, DELETED, BOOKMARK."""
    object: Json


def connect(
    *, kubeconfig: Path | None = None, context: str | None = None, connections_max: int = 16, limits: Limits = Limits(),
) -> KubernetesClient:
    """A client from a kubeconfig file, the environment (KUBECONFIG, ~/.kube/config) or the pod's service account.

    Raises InputError when there are no credentials. Nothing is asked yet.
    """
    configuration = k8s.Configuration()
    try:
        if kubeconfig is None and context is None and Path("/var/run/secrets/kubernetes.io/serviceaccount/token").is_file():
            k8s_config.load_incluster_config(client_configuration=configuration)
        else:
            file = str(kubeconfig) if kubeconfig is not None else None
            k8s_config.load_kube_config(
                config_file=file, context=context, client_configuration=configuration, persist_config=False)
    except (ConfigException, OSError) as e:
        raise InputError(f"no credentials for Kubernetes: {e}; expected KUBECONFIG, ~/.kube/config or a pod's service account") from e
    configuration.retries = cast("Any", False)  # counted and bounded here, not below
    configuration.connection_pool_maxsize = connections_max
    return KubernetesClient(k8s.ApiClient(configuration), limits=limits)


def current_namespace(kubeconfig: Path | None = None, context: str | None = None) -> str:
    """Namespace of the service account or of the kubeconfig's context; `default` when neither says one."""
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
    if kubeconfig is None and context is None and account.is_file():
        return account.read_text(encoding="utf-8").strip() or "default"
    try:
        found_in_file = k8s_config.list_kube_config_contexts(str(kubeconfig) if kubeconfig is not None else None)
    except (ConfigException, OSError):
        return "default"
    contexts, active = cast("tuple[list[Json], Json]", found_in_file)
    found = next((c for c in contexts if c["name"] == context), active)
    return str(found.get("context", {}).get("namespace") or "default")


class KubernetesClient:
    """Safe between threads. `fenced` gives one that asks before each write; both share connections and the retry budget."""

    def __init__(
        self, api: k8s.ApiClient, *, limits: Limits = Limits(), fence: Fence | None = None, budget: RetryBudget | None = None,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api, self._limits, self._fence = api, limits, fence
        self._budget = budget or RetryBudget()
        self._clock, self._sleep = clock, sleep

    def fenced(self, fence: Fence, limits: Limits | None = None) -> KubernetesClient:
        """The same client, which asks `fence` before each write."""
        return KubernetesClient(
            self._api, limits=limits or self._limits, fence=fence, budget=self._budget, clock=self._clock, sleep=self._sleep)

    def hurried(self, deadline_s: float) -> KubernetesClient:
        """The same client with a shorter deadline per call (leader election)."""
        short = replace(self._limits, call_deadline_s=deadline_s, read_timeout_s=min(self._limits.read_timeout_s, deadline_s),
                        connect_timeout_s=min(self._limits.connect_timeout_s, deadline_s))
        return KubernetesClient(
            self._api, limits=short, fence=self._fence, budget=self._budget, clock=self._clock, sleep=self._sleep)

    def limited(self, limits: Limits) -> KubernetesClient:
        """The same client with other bounds per call."""
        return KubernetesClient(
            self._api, limits=limits, fence=self._fence, budget=self._budget, clock=self._clock, sleep=self._sleep)

    def ask_fence(self) -> None:
        """For what is written elsewhere. Raises LeaseLost when this process may not write."""
        if self._fence is not None:
            self._fence()

    # --- reading --------------------------------------------------------------------------------------------------------------

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        """The object. Raises NotFound, or another KubernetesError."""
        return self._json("GET", kind.path(namespace, name), f"get {kind.name} {_where(namespace, name)}")

    def find(self, kind: Kind, namespace: str, name: str) -> Json | None:
        """The object, or None when there is certainly none."""
        try:
            return self.get(kind, namespace, name)
        except NotFound:
            return None

    def list(
        self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "", cached: bool = False,
    ) -> ObjectList:
        """All objects (of all namespaces without one). `cached`: the server's cache will do, which costs etcd nothing."""
        items: list[Json] = []
        version = ""
        for page in self.pages(kind, namespace, labels=labels, fields=fields, cached=cached):
            items += page.items
            version = page.resource_version
        return ObjectList(tuple(items), version)

    def pages(
        self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "", cached: bool = False, objects_max: int | None = None,
    ) -> Iterator[ObjectList]:
        """The same page by page, for who doesn't keep the objects. Raises Unreadable at the page after `objects_max`."""
        most, count = self._limits.list_objects_max if objects_max is None else objects_max, 0
        query: dict[str, str] = {"limit": str(self._limits.page_objects_max)}
        if cached:
            query |= {"resourceVersion": "0"}
        query |= {k: v for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v}
        what = f"list {kind.plural} in {namespace or 'all namespaces'}"
        while True:
            page = self._json("GET", f"{kind.path(namespace)}?{urlencode(query)}", what)
            found = tuple(cast("list[Json]", page.get("items") or []))
            meta = cast("Json", page.get("metadata") or {})
            count += len(found)
            yield ObjectList(found, str(meta.get("resourceVersion", "")))
            more = meta.get("continue")
            if not more:
                return
            if count >= most:
                raise Unreadable(f"{what}: more than {most} objects; narrow it by namespace or labels")
            query = {k: v for k, v in query.items() if k != "resourceVersion"} | {"continue": str(more)}

    def version_of(self, kind: Kind, namespace: str = "") -> str:
        """From where a watch begins that misses nothing from now on. One object is read, however many there are."""
        what = f"list {kind.plural} in {namespace or 'all namespaces'}"
        page = self._json("GET", f"{kind.path(namespace)}?{urlencode({'limit': '1'})}", what)
        return str(cast("Json", page.get("metadata") or {}).get("resourceVersion", ""))

    def watch(
        self, kind: Kind, namespace: str, resource_version: str, timeout_s: float, *, labels: str = "",
    ) -> Iterator[WatchEvent]:
        """Changes since a list, for at most `timeout_s`. Raises Gone when the version is too old: list anew."""
        query = {"watch": "1", "resourceVersion": resource_version, "timeoutSeconds": str(max(1, round(timeout_s))),
                 "allowWatchBookmarks": "true", **({"labelSelector": labels} if labels else {})}
        what = f"watch {kind.plural} in {namespace or 'all namespaces'}"
        try:
            answer = self._once("GET", f"{kind.path(namespace)}?{urlencode(query)}", None, "application/json", timeout_s + 5.0, what)
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Unavailable(f"{what}: no answer: {e}") from e
        try:
            if answer.status != 200:
                raise _error(what, answer.status, answer.read(self._limits.answer_bytes_max), answer.headers)
            for line in _lines(answer, self._limits.answer_bytes_max, what):
                event = _parsed(line, what)
                found = cast("Json", event.get("object") or {})
                if event.get("type") == "ERROR":
                    code = int(found.get("code") or 500)
                    raise error_type(code)(f"{what}: {found.get('message', 'no message')}", status=code)
                yield WatchEvent(str(event.get("type")), found)
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Unavailable(f"{what}: the connection broke: {e}") from e
        finally:
            answer.close()
            answer.release_conn()

    def resources(self, kind: Kind) -> frozenset[str] | None:
        """Plural names (`pods`, `pods/status`) that the server knows in the kind's group and version; None: not even the group."""
        try:
            found = self._json("GET", kind.root, f"discover {kind.api_version}")
        except NotFound:
            return None
        return frozenset(str(r.get("name")) for r in cast("list[Json]", found.get("resources") or []))

    def events_of(self, item: Json) -> tuple[Json, ...]:
        """Kubernetes events about one object, oldest first."""
        meta = item["metadata"]
        found = self.list(EVENT, meta.get("namespace", "default"), fields=f"involvedObject.uid={meta['uid']}")
        return tuple(sorted(found.items, key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or "")))

    # --- writing --------------------------------------------------------------------------------------------------------------

    def apply(
        self, kind: Kind, item: Json, *, manager: str = FIELD_MANAGER, force: bool = True, subresource: str = "", dry_run: bool = False,
    ) -> Json:
        """Server-side apply: the fields given become the manager's, those it gave before and gives no more are removed.

        With `metadata.resourceVersion` in the object it is a precondition: Conflict when anybody wrote since.
        """
        meta = item["metadata"]
        query = urlencode({"fieldManager": manager, "force": str(force).lower(), **({"dryRun": "All"} if dry_run else {})})
        namespace = meta.get("namespace", "")
        body = {"apiVersion": kind.api_version, "kind": kind.name, **item}
        return self._json(
            "PATCH", f"{kind.path(namespace, meta['name'], subresource)}?{query}",
            f"apply {kind.name} {_where(namespace, meta['name'])}{' ' + subresource if subresource else ''}", body,
            "application/apply-patch+yaml")

    def apply_status(
        self, kind: Kind, namespace: str, name: str, status: Json, *, resource_version: str, manager: str = FIELD_MANAGER,
    ) -> Json:
        """The whole status, only if nobody wrote the object since `resource_version`."""
        item = {"metadata": {"name": name, "namespace": namespace, "resourceVersion": resource_version}, "status": status}
        return self.apply(kind, item, manager=manager, subresource="status")

    def merge(
        self, kind: Kind, namespace: str, name: str, change: Json, *, manager: str = FIELD_MANAGER, subresource: str = "",
    ) -> Json:
        """JSON merge patch: None removes a field. A `metadata.resourceVersion` in it is a precondition."""
        query = urlencode({"fieldManager": manager})
        return self._json("PATCH", f"{kind.path(namespace, name, subresource)}?{query}",
                          f"patch {kind.name} {_where(namespace, name)}", change, "application/merge-patch+json")

    def create(self, kind: Kind, item: Json, *, manager: str = FIELD_MANAGER) -> Json:
        """A new object. Conflict when the name is taken."""
        namespace = item["metadata"].get("namespace", "")
        name = item["metadata"].get("name") or item["metadata"].get("generateName", "")
        body = {"apiVersion": kind.api_version, "kind": kind.name, **item}
        return self._json("POST", f"{kind.path(namespace)}?{urlencode({'fieldManager': manager})}",
                          f"create {kind.name} {_where(namespace, name)}", body)

    def update(self, kind: Kind, item: Json, *, manager: str = FIELD_MANAGER) -> Json:
        """The object as a whole. It must carry the resourceVersion that it was read with."""
        meta = item["metadata"]
        body = {"apiVersion": kind.api_version, "kind": kind.name, **item}
        return self._json("PUT", f"{kind.path(meta.get('namespace', ''), meta['name'])}?{urlencode({'fieldManager': manager})}",
                          f"update {kind.name} {_where(meta.get('namespace', ''), meta['name'])}", body)

    def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str = "", resource_version: str = "",
        propagation: Literal["Background", "Foreground", "Orphan"] = "Background",
    ) -> None:
        """Deletes the object that was seen (`uid`, `resource_version`), not another of the same name. NotFound when it is gone."""
        preconditions = {k: v for k, v in (("uid", uid), ("resourceVersion", resource_version)) if v}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation,
                **({"preconditions": preconditions} if preconditions else {})}
        self._json("DELETE", kind.path(namespace, name), f"delete {kind.name} {_where(namespace, name)}", body)

    # --- one call -------------------------------------------------------------------------------------------------------------

    def _json(self, method: _METHODS, path: str, what: str, body: Json | None = None, content: str = "application/json") -> Json:
        limits, began = self._limits, self._clock()
        self._budget.called()
        wait_s = limits.backoff_first_s
        for attempt in range(1, limits.attempts_max + 1):
            left = limits.call_deadline_s - (self._clock() - began)
            error: KubernetesError
            try:
                answer = self._once(method, path, body, content, max(0.1, min(limits.read_timeout_s, left)), what)
                try:
                    data = answer.read(limits.answer_bytes_max + 1)
                finally:
                    answer.release_conn()
                if len(data) > limits.answer_bytes_max:
                    raise Unreadable(f"{what}: the answer is larger than {limits.answer_bytes_max} bytes")
                if 200 <= answer.status < 300:
                    return _parsed(data, what)
                error = _error(what, answer.status, data, answer.headers)
                if error.status not in _RETRIED:
                    raise error
            except (urllib3.exceptions.HTTPError, OSError) as e:
                error = Unavailable(f"{what}: no answer: {e}")
            pause = error.retry_after_s if error.retry_after_s is not None else wait_s * random.uniform(0.5, 1.0)  # noqa: S311
            wait_s *= 2
            late = self._clock() - began + pause >= limits.call_deadline_s
            if attempt == limits.attempts_max or late or not self._budget.take():
                raise error
            self._sleep(pause)
        raise AssertionError("unreachable")

    def _once(
        self, method: _METHODS, path: str, body: Json | None, content: str, timeout_s: float, what: str,
    ) -> urllib3.BaseHTTPResponse:
        if method != "GET" and self._fence is not None:
            self._fence()
        headers = {"Accept": "application/json", "User-Agent": "hafnium-rollout"}
        if body is not None:
            headers["Content-Type"] = content
        configuration = self._api.configuration
        self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            data = json.dumps(body, allow_nan=False).encode() if body is not None else None
        except ValueError as e:
            raise Unreadable(f"{what}: not a number that JSON knows: {e}") from e
        return self._api.rest_client.pool_manager.request(
            method, configuration.host + path, body=data, headers=headers, preload_content=False, retries=False, redirect=False,
            timeout=urllib3.Timeout(connect=min(self._limits.connect_timeout_s, timeout_s), read=timeout_s),
        )


def _where(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def _parsed(data: bytes, what: str) -> Json:
    try:
        found = json.loads(data)
    except ValueError as e:
        raise Unreadable(f"{what}: the answer is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise Unreadable(f"{what}: the answer is {type(found).__name__}, expected an object")
    return cast("Json", found)


def _error(what: str, status: int, data: bytes, headers: Mapping[str, str]) -> KubernetesError:
    """The server's Status object in words."""
    try:
        message = str(json.loads(data).get("message") or "")
    except (ValueError, AttributeError):
        message = data[:300].decode("utf-8", "replace").strip()
    if _UNDECLARED in message:  # the API server calls it 500, but repeating changes nothing
        message += "; the CRD is older than this operator: kubectl apply --server-side -f manifests/crds.yaml of its version"
        status = 422
    after = retry_after_s(headers.get("Retry-After"), datetime.now(UTC)) if status in _RETRIED else None
    return error_type(status)(f"{what}: {message or 'no message'} ({status})", status=status, retry_after_s=after)


def retry_after_s(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for; None when there is none that can be understood."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    except (ValueError, TypeError):
        return None


def _lines(answer: urllib3.BaseHTTPResponse, bytes_max: int, what: str) -> Iterator[bytes]:
    """Whole lines as they come."""
    rest = b""
    for chunk in answer.stream(65_536, decode_content=True):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())
        if len(rest) > bytes_max:
            raise Unreadable(f"{what}: one event is larger than {bytes_max} bytes")
