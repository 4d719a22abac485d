"""Settings of the operator: command line first, then HAFNIUM_OPERATOR_<NAME> in the environment, then the default."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hafnium_contract.errors import InputError

ENVIRONMENT_PREFIX = "HAFNIUM_OPERATOR_"
_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class Settings(BaseModel):
    """Each field is also a flag (`--look_s`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespace: str = Field(default="", pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$")
    """Guard the ModelRollouts of this namespace alone: a Role there is enough, beside a ClusterRole for Gateways and their classes. Empty:
    all namespaces."""
    kubeconfig: Path | None = None
    """Credentials. Without it: the pod's service account, else KUBECONFIG, else ~/.kube/config."""
    lease_namespace: str = Field(default="hafnium-system", pattern=_NAME)
    """Where the Lease of the leader election lies."""
    lease_name: str = Field(default="hafnium-rollout-operator", pattern=_NAME)
    """Operators of different namespaces need different names."""
    identity: str = ""
    """Name in the Lease; it must be one process' own. Empty: host name, process and a random part."""
    lease_duration_s: float = Field(default=15.0, ge=1, le=600)
    """A leader that was not heard of for this long is replaced. client-go's default."""
    lease_renew_deadline_s: float = Field(default=10.0, ge=0.5, le=600)
    """A leader that could not renew for this long stops writing. The gap to the duration is what a write under way may need."""
    lease_retry_s: float = Field(default=2.0, ge=0.05, le=60)
    """Time between two tries."""
    look_s: float = Field(default=15.0, ge=0.2, le=3600)
    """Time between two looks at a rollout under way; also the regular turn over all of them, watches or not. Prometheus' own default
    for scrapes: looking more often sees nothing new."""
    turn_min_s: float = Field(default=0.2, ge=0.01, le=60)
    """Watches wake the loop at most this often, so that a burst of changes is one turn."""
    threads: int = Field(default=8, ge=1, le=64)
    """Rollouts looked at side by side: waiting for Prometheus is most of the time."""
    watch: bool = True
    """Let changes wake the loop. Without, it turns every look_s."""
    prometheus_url: str = Field(default="", pattern=r"^(https?://[^\s@]+)?$")
    """Prometheus, or anything that speaks its API. Without user and password: it stands in messages that every viewer reads. Empty: gates
    over counters have no data, which holds every rollout that has one."""
    prometheus_timeout_s: float = Field(default=5.0, gt=0, le=60)
    """Of one query. A Prometheus that needs longer is as good as gone for this look."""
    scrape_interval_s: float = Field(default=15.0, gt=0, le=600)
    """Prometheus' scrape interval for the pods. A look counts for Pass from two of them after a weight was seen; a pod whose last
    scrape is older than four is stale."""
    clock_skew_s_max: float = Field(default=5.0, gt=0, le=600)
    """Prometheus' clock and ours may differ by so much. Beyond, it can't be said whether a look came before or after a weight."""
    gateway: str = Field(default="kserve/kserve-ingress-gateway", pattern=r"^[-a-z0-9]+/[-a-z0-9.]+$")
    """NAMESPACE/NAME of the Gateway for rollouts that name none. KServe's own default."""
    drain_s: float = Field(default=10.0, ge=0, le=600)
    """A candidate's service is deleted so long after the route was written without it. A gateway may report a route before it follows
    it: on a cluster some answers came from no model when the service was deleted at once."""
    ingress_domain: str = Field(default="example.com", pattern=r"^[-a-z0-9.]+$")
    """A rollout without hostnames answers at NAME-NAMESPACE.DOMAIN. KServe's own default; must be KServe's ingressDomain."""
    mirroring_controllers: str = (
        "projectcontour.io/gateway-controller,gateway.envoyproxy.io/gatewayclass-controller,istio.io/gateway-controller")
    """Gateway controllers that mirror requests though their GatewayClass doesn't list the feature HTTPRouteRequestMirror. Traefik
    is none: its route with a mirror is accepted and answers 500."""
    inference_log: str = Field(default="", pattern=r"^[^@]*$")
    """Where the transformers' inference log is: a folder (of a mounted volume) or s3://BUCKET/PREFIX (credentials come from the
    environment, never from here: it stands in messages), with {namespace}, {rollout} and
    {service} filled in. Needed for gates that compare scores."""
    data_folder: Path | None = None
    """Folder on a volume that outlives the pod: every turn of each rollout (`hafnium rollout replay`, `report`), evidence that was removed,
    what receivers were sent, attempts at retraining. With several replicas all of them must have it. Empty: turns are not recorded, and of
    removed evidence the log's line is all that stays."""
    settings_file: Path | None = None
    """YAML with notifications, retraining and the record's limits (docs/rollout-commands.md), from a ConfigMap. Webhooks and
    retraining need data_folder."""
    evidence_kept: int = Field(default=24, ge=20, le=1_000)
    """Of each kind of finding and each model that a ModelRollout names, the newest so many ModelEvidence are kept; others are removed when
    no gate can look at them any more (docs/drift.md). A day of the hourly job, and more than the 20 Fails in a row that a retraining may
    wait for. Each costs a turn 5 kB from the API server, and the operator 12 kB of memory."""
    evidence_removals_max: int = Field(default=100, ge=0, le=1_000)
    """ModelEvidence that are removed at one look: 400 a minute, of which an API server notices little. 0: none is ever removed, and
    somebody else has to."""
    http_host: str = "0.0.0.0"  # noqa: S104 - a pod is reached by its address
    """Address of health and metrics."""
    http_port: int = Field(default=8080, ge=0, le=65535)
    """Port of /health/live, /health/ready and /metrics. 0: a free one, which the log names."""
    rollouts_max: int = Field(default=2_000, ge=1)
    """ModelRollouts that are looked at; beyond it the operator says so and takes the first by name. 500 were measured."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.lease_renew_deadline_s >= self.lease_duration_s:
            raise ValueError("lease_renew_deadline_s must be below lease_duration_s, else two may write at once")
        if self.lease_retry_s >= self.lease_renew_deadline_s:
            raise ValueError("lease_retry_s must be below lease_renew_deadline_s, else the lease is never renewed in time")
        return self

    @property
    def default_gateway(self) -> tuple[str, str]:
        namespace, _, name = self.gateway.partition("/")
        return namespace, name

    @property
    def mirroring(self) -> frozenset[str]:
        return frozenset(c.strip() for c in self.mirroring_controllers.split(",") if c.strip())


def parse_settings(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> Settings:
    """Command line and environment → Settings. Raises InputError that names the flag; `--help` exits."""
    parser = argparse.ArgumentParser(prog="hafnium_rollout operator", description=__doc__, allow_abbrev=False)
    for name, field in Settings.model_fields.items():
        text = f"{field.description} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, default=argparse.SUPPRESS, help=text)
    values: dict[str, Any] = {n: env[key] for n in Settings.model_fields if (key := ENVIRONMENT_PREFIX + n.upper()) in env}
    values |= vars(parser.parse_args(argv))
    try:
        return Settings.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        where = f"--{name} (or {ENVIRONMENT_PREFIX}{name.upper()}): {message}, got {first['input']!r}" if name else message
        raise InputError(where) from e
