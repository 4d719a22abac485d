"""Envoy's admin endpoint → what the gateway does and what it counted, per arm.

Measured with Envoy 1.40 (tests/rollouts/test_envoy_counters.py runs the real one):
- `rq_error` of the service's own endpoint (priority 0) counts each failed attempt once, whether it was a 5xx answer, a reset,
  a timeout or a refused connection; `rq_success` the others, 4xx too. `rq_total` leaves refused connections out and is not used.
  Copies of requests are counted like requests.
- `upstream_rq_xx` of class 4 counts answers that refuse a request. Bad requests of callers meet both arms alike and cancel out in
  the comparison; what only the candidate refuses is its own fault (a unit that leaves the contract's range, for example).
- An attempt that went on to the stable endpoint (priority 1 of the candidate's cluster) is counted there and so for no arm.
- `upstream_rq_completed` of the cluster counts client requests: retries are not in it.
- `upstream_rq_time` has one entry per client request that got an answer from a server, including the time of failed attempts
  before it. It appears at Envoy's stats flush, up to 5 s later, so a look may hold the requests of the one before.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from hafnium_rollout.errors import StateError
from hafnium_rollout.observation import LiveRoute

TIMEOUT_S = 2.0
BODY_BYTES_MAX = 64 * 1024 * 1024
_SAMPLE = re.compile(r'^envoy_cluster_upstream_rq_(completed|xx|time_count|time_bucket)\{([^}]*)\} ([0-9.e+]+)$')
_LABEL = re.compile(r'([a-z_]+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class ArmCounters:
    """Counters of one service since Envoy (or its cluster) began."""

    endpoint: str
    """host:port of the service's own endpoint: another one has other counters."""
    success: int
    error: int
    completed: int
    timed: int
    not_slower: Mapping[float, int]
    """Bucket bound in ms → requests that took at most that long."""
    refused: int = 0
    """4xx; in `success` too."""

    def as_data(self) -> dict[str, Any]:
        """For the cursor in the status."""
        buckets = {f"{k:.15g}": v for k, v in self.not_slower.items()}
        return {"endpoint": self.endpoint, "success": self.success, "error": self.error, "completed": self.completed,
                "timed": self.timed, "notSlower": buckets, "refused": self.refused}


def from_data(data: Any) -> ArmCounters | None:
    """A cursor's counters, or None when there are none or they have another form (the next look is then a first one)."""
    try:
        return ArmCounters(str(data["endpoint"]), int(data["success"]), int(data["error"]), int(data["completed"]),
                           int(data["timed"]), {float(k): int(v) for k, v in data["notSlower"].items()}, int(data["refused"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def was_reset(before: ArmCounters, after: ArmCounters) -> bool:
    """Counters began anew in between: any fell, or the endpoint is another."""
    return (
        before.endpoint != after.endpoint or after.success < before.success or after.error < before.error
        or after.completed < before.completed or after.timed < before.timed or after.refused < before.refused
    )


class EnvoyAdmin:
    """Reads one Envoy. Every request has a time and a size limit."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._host, self._port = host, port

    def counters(self, services: Sequence[str]) -> dict[str, ArmCounters]:
        """Counters of those services that Envoy knows. Raises StateError when Envoy can't be asked."""
        endpoints = self._endpoints(set(services))
        names = "|".join(re.escape(s) for s in services)
        text = self._get(f"/stats?format=prometheus&filter=^cluster%5C.({names})%5C.upstream_rq_(completed|4xx|time)$")
        completed: dict[str, int] = {}
        timed: dict[str, int] = {}
        refused: dict[str, int] = {}
        buckets: dict[str, dict[float, int]] = {}
        for line in text.splitlines():
            match = _SAMPLE.match(line)
            if match is None:
                continue
            labels = dict(_LABEL.findall(match[2]))
            name, value = labels.get("envoy_cluster_name", ""), int(float(match[3]))
            if match[1] == "completed":
                completed[name] = value
            elif match[1] == "xx":
                refused[name] = refused.get(name, 0) + (value if labels.get("envoy_response_code_class") == "4" else 0)
            elif match[1] == "time_count":
                timed[name] = value
            elif labels.get("le", "+Inf") != "+Inf":
                buckets.setdefault(name, {})[float(labels["le"])] = value
        return {
            name: ArmCounters(endpoint, ok, bad, completed.get(name, 0), timed.get(name, 0), buckets.get(name, {}), refused.get(name, 0))
            for name, (endpoint, ok, bad) in endpoints.items()
        }

    def _endpoints(self, services: set[str]) -> dict[str, tuple[str, int, int]]:
        found: dict[str, tuple[str, int, int]] = {}
        for cluster in cast("list[dict[str, Any]]", self._json("/clusters?format=json").get("cluster_statuses", [])):
            own = [h for h in cluster.get("host_statuses", []) if not h.get("priority")]
            if cluster.get("name") not in services or not own:
                continue
            stats = [{s["name"]: int(s.get("value", 0)) for s in h.get("stats", [])} for h in own]
            address = ",".join(
                f"{h['address']['socket_address']['address']}:{h['address']['socket_address']['port_value']}" for h in own)
            found[cluster["name"]] = (
                address, sum(s.get("rq_success", 0) for s in stats), sum(s.get("rq_error", 0) for s in stats))
        return found

    def live_route(self, name: str) -> LiveRoute:
        """What Envoy does for the virtual host `name`; empty when it has none. Raises StateError when it can't be asked."""
        dump = self._json("/config_dump?resource=dynamic_route_configs", absent={})
        for config in dump.get("configs", []):
            for host in config.get("route_config", config).get("virtual_hosts", []):
                if host.get("name") == name:
                    return _live(host.get("routes", []))
        return LiveRoute({})

    def _json(self, path: str, absent: Any = None) -> Any:
        text = self._get(path, missing_ok=absent is not None)
        if text == "" and absent is not None:
            return absent
        try:
            return json.loads(text)
        except ValueError as e:
            raise StateError(f"Envoy's admin port {self._port}: {path} is not JSON: {e}") from e

    def _get(self, path: str, *, missing_ok: bool = False) -> str:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read(BODY_BYTES_MAX)
            if answer.status == 404 and missing_ok:
                return ""
            if answer.status != 200:
                raise StateError(f"Envoy's admin port {self._port}: {path} answered {answer.status}")
            return body.decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as e:
            raise StateError(f"Envoy's admin port {self._port} can't be asked: {e}") from e
        finally:
            connection.close()


def _live(routes: Sequence[Mapping[str, Any]]) -> LiveRoute:
    """Weights in percent of the most general route, and every cluster that gets copies."""
    weights: dict[str, int] = {}
    mirrors: set[str] = set()
    for route in routes:
        action = route.get("route", {})
        mirrors |= {p["cluster"] for p in action.get("request_mirror_policies", []) if p.get("cluster")}
        arms = action.get("weighted_clusters", {}).get("clusters", [])
        total = sum(a.get("weight", 0) for a in arms)
        if action.get("cluster"):
            weights = {action["cluster"]: 100}
        elif total > 0:
            weights = {a["name"]: round(100 * a.get("weight", 0) / total) for a in arms}
    return LiveRoute(weights, frozenset(mirrors))
