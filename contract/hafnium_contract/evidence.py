"""ModelEvidence: what a monitoring job found about one model over one window. Written once, never changed.

On a cluster this is a custom resource, on one machine a JSON file of the same shape; both are read with `parse_evidence`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, ValidationError

from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import Strict

API_VERSION = "hafnium.dev/v1alpha1"
Verdict = Literal["Pass", "Fail", "Inconclusive", "NoData", "Error"]
"""They never merge: NoData and Error are neither success nor failure."""


class EvidenceError(HafniumError):
    """An evidence file is unreadable or has another form."""


class EvidenceValue(Strict):
    """One number behind the verdict."""

    name: str
    """What it was measured on: a feature, `score`, `missing:<feature>`."""
    statistic: str
    """Which number it is: `psi`, `missing_share`, `brier`, …"""
    value: float
    threshold: float | None = None
    p_value: float | None = None
    drifted: bool = False
    compared_with: Literal["reference", "stable"] = "reference"


class EvidenceSpec(Strict):
    model_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    kind: Literal["drift", "performance", "smoke", "fairness"]
    window_start: AwareDatetime
    window_end: AwareDatetime
    verdict: Verdict
    samples: int = Field(ge=0)
    """Rows of the model under test that the verdict rests on."""
    values: tuple[EvidenceValue, ...] = ()
    message: str
    """One sentence that a person on call understands."""
    both_arms: bool = False
    """The stable model's input drifted too: the world changed, not the candidate."""
    report: str = ""
    """Link or path of the HTML report."""
    job: str = ""
    created_at: AwareDatetime


class Metadata(Strict):
    name: str


class ModelEvidence(Strict):
    api_version: Literal["hafnium.dev/v1alpha1"] = API_VERSION
    kind: Literal["ModelEvidence"] = "ModelEvidence"
    metadata: Metadata
    spec: EvidenceSpec


def parse_evidence(data: Any, source: str) -> ModelEvidence:
    """JSON data → ModelEvidence. Raises EvidenceError that names the source and the field."""
    try:
        return ModelEvidence.model_validate(data)
    except ValidationError as e:
        x = e.errors()[0]
        raise EvidenceError(f"{source}: {'.'.join(str(s) for s in x['loc'])}: {x['msg']}") from e


def evidence_name(spec: EvidenceSpec) -> str:
    """`drift-<digest8>-<end of window>`: one name for one finding, so writing it twice is seen."""
    stamp = spec.window_end.strftime("%Y%m%dt%H%M%S%f")[:-3]
    return f"{spec.kind}-{spec.model_digest.removeprefix('sha256:')[:8]}-{stamp}z"


def write_evidence(folder: Path, spec: EvidenceSpec) -> Path:
    """Writes the evidence as `<folder>/<name>.json`, atomically, never over an existing one (FileExistsError)."""
    folder.mkdir(parents=True, exist_ok=True)
    name = evidence_name(spec)
    evidence = ModelEvidence(metadata=Metadata(name=name), spec=spec)
    target = folder / f"{name}.json"
    fd, staging = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as f:
            json.dump(evidence.model_dump(mode="json"), f, indent=2, allow_nan=False)
            f.flush()
            os.fsync(f.fileno())
        os.link(staging, target)  # unlike rename, a link never replaces
    finally:
        Path(staging).unlink()
    return target


def read_evidence(folder: Path, *, since: datetime | None = None) -> Iterator[ModelEvidence | EvidenceError]:
    """All evidence in a folder, oldest first by name. A file that can't be read is yielded as its error, not skipped."""
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*.json")):
        try:
            found = parse_evidence(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as e:
            yield EvidenceError(f"{path}: {e}")
            continue
        except EvidenceError as e:
            yield e
            continue
        if since is None or found.spec.created_at >= since:
            yield found
