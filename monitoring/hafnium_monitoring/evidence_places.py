"""Where evidence is written to: a folder on one machine, a ModelEvidence of the API server on a cluster. Once, and never over another."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hafnium_contract.evidence import EvidenceSpec, Metadata, ModelEvidence, evidence_name, write_evidence
from hafnium_monitoring.api_server import JSON, ApiServer, this_pod
from hafnium_monitoring.errors import ApiServerError, ExistsError, UnwrittenError, WrittenError
from hafnium_monitoring.lock import evidence_lock
from hafnium_monitoring.report import prune, remove_report

_LOG = logging.getLogger("hafnium.monitoring")
CLUSTER = "kubernetes"
"""The `--evidence` that means the API server; a folder of this name is ./kubernetes."""
GROUP, VERSION, PLURAL = "hafnium.dev", "v1alpha1", "modelevidences"
OBJECT_BYTES_MAX = 1_000_000
"""Of one object as JSON. The API server takes 1.5 MB, and managedFields need room."""


class EvidencePlace(Protocol):
    """Takes findings."""

    def write(self, spec: EvidenceSpec) -> str:
        """Where it is now. Raises WrittenError when evidence of this model, kind and window is there already, and UnwrittenError or
        ApiServerError when it can't be written."""
        ...


def evidence_place(given: str) -> EvidencePlace:
    """`--evidence`: a folder, or `kubernetes` for the API server of the cluster that this pod runs in."""
    return ClusterEvidence(this_pod()) if given == CLUSTER else FolderEvidence(Path(given))


@dataclass(frozen=True)
class FolderEvidence:
    """JSON files of one machine."""

    folder: Path

    def write(self, spec: EvidenceSpec) -> str:
        try:
            return str(write_evidence(self.folder, spec))
        except FileExistsError as e:
            if e.filename2 is None:  # the folder itself is a file
                raise self._unwritten(spec, e) from e
            raise _exists(e.filename2) from e
        except OSError as e:
            raise self._unwritten(spec, e) from e

    def _unwritten(self, spec: EvidenceSpec, e: OSError) -> UnwrittenError:
        return UnwrittenError(
            f"{self.folder}: evidence can't be written ({e.strerror or e}); what was found: {spec.kind} of {spec.model_digest[:15]}: "
            f"{spec.verdict}: {spec.message}"
        )


@dataclass(frozen=True)
class ClusterEvidence:
    """ModelEvidence objects, in the pod's namespace: an admission policy takes them from its own service accounts only."""

    server: ApiServer

    def write(self, spec: EvidenceSpec) -> str:
        item = evidence_object(spec)
        where = f"ModelEvidence {self.server.namespace}/{item['metadata']['name']}"
        try:
            self.server.create(GROUP, VERSION, PLURAL, item)
        except ExistsError as e:
            raise _exists(where) from e
        return where


def write_with_report(place: EvidencePlace, spec: EvidenceSpec, keep_reports: int) -> str:
    """Writes evidence whose report is written already, then removes all but the newest reports. Raises what `place.write` raises, and
    removes the report: nothing links to it.

    In this order, since a window that is judged again is refused here, and its report must not push out one that evidence links to.
    """
    try:
        where = place.write(spec)
    except Exception:
        remove_report(spec)
        raise
    if spec.report:
        folder = Path(spec.report).parent
        try:
            prune(folder, keep_reports)
        except OSError as e:
            _LOG.warning("%s: old reports can't be removed (%s); the next run with a report tries again", folder, e.strerror or e)
    return where


def evidence_object(spec: EvidenceSpec) -> JSON:
    """The object that is created. Pure. Raises ApiServerError when it is too large for the API server."""
    labels = {"app.kubernetes.io/name": "hafnium", "app.kubernetes.io/component": "monitoring", "hafnium.dev/evidence-kind": spec.kind}
    evidence = ModelEvidence(metadata=Metadata(name=evidence_name(spec)), spec=spec)
    # Absent and not null: the schema of the API server knows no null
    item = evidence.model_dump(mode="json", by_alias=True, exclude_none=True)
    item["metadata"]["labels"] = labels
    size = len(json.dumps(item).encode())
    if size > OBJECT_BYTES_MAX:
        raise ApiServerError(f"evidence {evidence_name(spec)}: {size} bytes with {len(spec.values)} values, at most {OBJECT_BYTES_MAX}")
    return item


@contextmanager
def alone(place: EvidencePlace) -> Generator[None]:
    """One writer per folder. On a cluster the CronJob's concurrencyPolicy sees to that, and names let each window be written once."""
    if isinstance(place, FolderEvidence):
        with evidence_lock(place.folder):
            yield
    else:
        yield


def _exists(where: object) -> WrittenError:
    return WrittenError(
        f"{where}: evidence of this kind about this model exists for a window that ends at this time, of this or another length; evidence "
        "is never changed"
    )
