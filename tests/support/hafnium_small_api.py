"""An API server of a few kinds in memory, behind real HTTP: for orders of events that the real one can't be made to show on demand.

It keeps objects, gives each write a new resourceVersion and refuses the ones that name an old one. What it leaves out (schemas, admission,
field owners, watches) is shown by the real one in tests/cluster.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from hafnium_scripted_api import Answer, Asked, ScriptedApi, data, says, scripted_api

from hafnium_rollout.kubernetes.kinds import Json, Kind

_PATH = re.compile(
    r"^(/api/v1|/apis/[^/]+/[^/]+)(/namespaces/(?P<ns>[^/]+))?/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?(/(?P<sub>[a-z]+))?$")
_Key = tuple[str, str, str]


@dataclass
class SmallApi:
    """`before` is asked about each call: None lets it pass, an Answer is given instead; it may also wait. `writes` passed, in order."""

    before: Callable[[Asked], Answer | None] = lambda _: None
    objects: dict[_Key, Json] = field(default_factory=dict[_Key, Json])
    writes: list[str] = field(default_factory=list[str])
    version: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, kind: Kind, item: Json) -> Json:
        """An object as somebody else wrote it."""
        meta = item["metadata"]
        return self._stored((kind.plural, meta.get("namespace", ""), meta["name"]), deepcopy(item))

    def get(self, kind: Kind, namespace: str, name: str) -> Json:
        with self._lock:
            return deepcopy(self.objects[kind.plural, namespace, name])

    def _stored(self, key: _Key, item: Json) -> Json:
        with self._lock:
            old = self.objects.get(key)
            self.version += 1
            meta = item["metadata"]
            meta |= {"resourceVersion": str(self.version), "uid": f"u-{key[0]}-{key[2]}"}
            changed = old is None or old.get("spec") != item.get("spec")
            meta["generation"] = (old["metadata"]["generation"] if old is not None else 0) + changed
            self.objects[key] = item
            return deepcopy(item)

    def __call__(self, asked: Asked) -> Answer:
        fault = self.before(asked)
        if fault is not None:
            return fault
        found = _PATH.match(urlsplit(asked.path).path)
        if found is None:
            return says(404, f"no such path {asked.path}")
        plural, namespace, name = found["plural"], found["ns"] or "", found["name"] or ""
        with self._lock:
            if asked.method == "GET":
                return self._read(plural, namespace, name)
            body = cast("Json", json.loads(asked.body))
            answer = self._write(asked.method, (plural, namespace, name or body["metadata"]["name"]), body, found["sub"] or "")
            if answer.status < 300:
                self.writes.append(f"{asked.method} {plural}{'/' + found['sub'] if found['sub'] else ''}")
            return answer

    def _read(self, plural: str, namespace: str, name: str) -> Answer:
        if name:
            item = self.objects.get((plural, namespace, name))
            return data(item) if item is not None else says(404, f"{plural} {namespace}/{name} not found")
        items = [i for k, i in sorted(self.objects.items()) if k[0] == plural and namespace in ("", k[1])]
        return data({"metadata": {"resourceVersion": str(self.version)}, "items": items})

    def _write(self, method: str, key: _Key, body: Json, subresource: str) -> Answer:
        old = self.objects.get(key)
        if method == "POST":
            return says(409, f"{key[2]} already exists") if old is not None else data(self._stored(key, body))
        if old is None:
            return says(404, f"{key[0]} {key[2]} not found") if method != "PATCH" else data(self._stored(key, body))
        wanted = body.get("preconditions", body.get("metadata", {})).get("resourceVersion")
        if wanted is not None and wanted != old["metadata"]["resourceVersion"]:
            return says(409, "the object has been modified")
        if method == "DELETE":
            del self.objects[key]
            return data({"kind": "Status", "status": "Success"})
        new = deepcopy(old)
        if subresource:
            new[subresource] = body[subresource]
        else:
            for part in ("spec", "metadata"):
                _merge(new.setdefault(part, {}), body.get(part, {}))
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        return data(old if new == old else self._stored(key, new))


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], cast("dict[str, Any]", value))
        else:
            into[key] = value


@contextmanager
def small_api() -> Generator[tuple[SmallApi, ScriptedApi]]:
    """The server, and the door that makes clients for it."""
    found = SmallApi()
    with scripted_api(found) as door:
        yield found, door
