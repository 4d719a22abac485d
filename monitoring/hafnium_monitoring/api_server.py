"""The Kubernetes API server, as far as a job needs it: read a list of objects, create an object. In a pod, with its service account.

Two verbs don't need the `kubernetes` package (75 MB). What they do need: the token is read anew for each call, since the kubelet replaces
it; every call has a limit on time, bytes and tries; and whatever goes wrong says what to do. Retried are 429, 500, 502, 503, 504,
broken connections and 409 for any reason but AlreadyExists (a quota's object was changed meanwhile): a create that comes twice is
refused as AlreadyExists, so it may be repeated.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from hafnium_contract.errors import InputError
from hafnium_monitoring.errors import ApiServerError, ExistsError, ForbiddenError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MANAGER = "hafnium-monitoring"
CALL_TIMEOUT_S = 10.0
"""Longest silence of one try. Admission webhooks may take 10 s."""
DEADLINE_S = 60.0
"""A call with all its tries. An API server that is away for longer is the CronJob's next run's business."""
ATTEMPTS_MAX = 5
BACKOFF_FIRST_S = 0.5
"""Doubled after each try, and drawn between half and all of it; Retry-After goes before it."""
ANSWER_BYTES_MAX = 64 * 1024 * 1024
PAGE_OBJECTS = 100
OBJECTS_MAX = 2_000
"""As many ModelRollouts as the operator looks at. More is an error, not a part that looks like the whole."""
_RETRIED = (409, 429, 500, 502, 503, 504)
JSON = dict[str, Any]


@dataclass(frozen=True)
class ApiServer:
    """Where it is, and who asks. Safe between threads: nothing is kept between calls."""

    host: str
    port: int
    account: Path
    """Folder with `token` and `ca.crt`."""
    namespace: str
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def list(self, group: str, version: str, plural: str) -> list[JSON]:
        """All objects of the namespace. Raises ApiServerError."""
        what, query, found = f"list {plural} in {self.namespace}", {"limit": str(PAGE_OBJECTS)}, cast("list[JSON]", [])
        while True:
            page = self._call("GET", f"{self._path(group, version, plural)}?{urlencode(query)}", what)
            found += cast("list[JSON]", page.get("items") or [])
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return found
            if len(found) >= OBJECTS_MAX:
                raise ApiServerError(f"{what}: more than {OBJECTS_MAX} objects; split the namespace")
            query["continue"] = str(more)

    def create(self, group: str, version: str, plural: str, item: JSON) -> JSON:
        """The object as the server keeps it. Raises ExistsError when the name is taken, else ApiServerError."""
        what = f"create {plural} {self.namespace}/{item['metadata']['name']}"
        return self._call("POST", f"{self._path(group, version, plural)}?{urlencode({'fieldManager': MANAGER})}", what, item)

    def _path(self, group: str, version: str, plural: str) -> str:
        return f"/apis/{group}/{version}/namespaces/{self.namespace}/{plural}"

    def _call(self, method: str, path: str, what: str, body: JSON | None = None) -> JSON:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        began, wait_s = self.clock(), BACKOFF_FIRST_S
        for attempt in range(1, ATTEMPTS_MAX + 1):
            after: float | None = None
            try:
                status, headers, answer = self._once(method, path, data)
                if 200 <= status < 300:
                    return _object(answer, what)
                error = _error(what, status, answer)
                if status not in _RETRIED or isinstance(error, ExistsError):
                    raise error
                after = _seconds(headers.get("retry-after"))
            except (OSError, http.client.HTTPException) as e:
                error = ApiServerError(f"{what}: {self.host}:{self.port} gives no answer: {type(e).__name__}: {e}")
            pause = after if after is not None else wait_s * random.uniform(0.5, 1.0)  # noqa: S311
            wait_s *= 2
            if attempt == ATTEMPTS_MAX or self.clock() - began + pause > DEADLINE_S:
                raise ApiServerError(f"{error} (tried {attempt} times)")
            self.sleep(pause)
        raise AssertionError("the loop returns or raises")

    def _once(self, method: str, path: str, data: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        try:
            token = (self.account / "token").read_text(encoding="ascii").strip()
            tls = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
        except (OSError, ssl.SSLError, UnicodeDecodeError) as e:
            raise InputError(
                f"{self.account}: no usable token and ca.crt ({e}); the pod needs a service account and automountServiceAccountToken: true"
            ) from e
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=CALL_TIMEOUT_S, context=tls)
        try:
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": "application/json",
                       "User-Agent": MANAGER}
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            text = answer.read(ANSWER_BYTES_MAX + 1)
            if len(text) > ANSWER_BYTES_MAX:
                raise ApiServerError(f"{method} {path}: the answer is larger than {ANSWER_BYTES_MAX} bytes")
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text
        finally:
            connection.close()


def this_pod(env: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> ApiServer:
    """The API server of the cluster that this pod runs in, in the pod's namespace. Raises InputError outside of a pod."""
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT_HTTPS") or env.get("KUBERNETES_SERVICE_PORT", "")
    try:
        namespace = (account / "namespace").read_text(encoding="utf-8").strip()
    except OSError as e:
        raise InputError(
            f"{account / 'namespace'}: can't be read ({e.strerror}); this works in a pod that has its service account's token "
            "(automountServiceAccountToken: true), elsewhere give --evidence DIR"
        ) from e
    if not host or not port.isdigit() or not namespace:
        raise InputError(f"KUBERNETES_SERVICE_HOST={host!r}, port {port!r}, namespace {namespace!r}: not as in a pod")
    return ApiServer(host, int(port), account, namespace)


def _object(answer: bytes, what: str) -> JSON:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError) as e:
        raise ApiServerError(f"{what}: the answer is not JSON: {e}") from e
    if not isinstance(found, dict):
        raise ApiServerError(f"{what}: the answer is {type(found).__name__}, expected an object")
    return cast("JSON", found)


def _error(what: str, status: int, answer: bytes) -> ApiServerError:
    reason = ""
    try:
        said = json.loads(answer)
        message, reason = str(said.get("message") or "no message"), str(said.get("reason") or "")
    except (ValueError, AttributeError, RecursionError):
        message = answer[:300].decode("utf-8", "replace").strip() or "no message"
    if status == 409 and reason == "AlreadyExists":
        return ExistsError(f"{what}: {message}")
    if status in (401, 403):
        return ForbiddenError(f"{what}: {message}; see kustomize/base/monitoring for the account and its role")
    if status == 404:
        return ApiServerError(f"{what}: {message} (404); are the types installed? kubectl apply --server-side -k kustomize/crds")
    return ApiServerError(f"{what}: {message} ({status})")


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; a date, or nonsense, counts as none."""
    try:
        return None if value is None else min(max(0.0, float(value)), DEADLINE_S)
    except ValueError:
        return None
