"""ModelEvidence: what a monitoring job found about one model over one window. Written once, never changed.

On a cluster this is a custom resource, on one machine a JSON file of the same shape; both are read with `parse_evidence`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

from hafnium_contract.errors import HafniumError
from hafnium_contract.model_contract import Strict

API_VERSION = "hafnium.dev/v1alpha1"
VALUES_MAX = 5_000
"""About 900 kB with the longest names: one object of the API server holds 1.5 MB."""
MESSAGE_CHARACTERS_MAX = 2_000
Verdict = Literal["Pass", "Fail", "Inconclusive", "NoData", "Error"]
"""They never merge: NoData and Error are neither success nor failure."""


class EvidenceError(HafniumError):
    """An evidence file is unreadable or has another form."""


_VALUE = ConfigDict(
    alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True, extra="forbid",
    use_attribute_docstrings=True, allow_inf_nan=False,  # JSON has neither
)


# A dataclass with slots and no BaseModel: a finding has dozens of them, an operator holds thousands of findings, and these are 100 bytes
# and not a thousand.
@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class EvidenceValue:
    """One number behind the verdict."""

    name: str = Field(max_length=100)
    """What it was measured on: a feature, `score`, `missing:<feature>`."""
    statistic: str = Field(max_length=63)
    """Which number it is: `psi`, `missing_share`, `brier`, …"""
    value: float
    """The number."""
    threshold: float | None = None
    """Where it begins to count."""
    p_value: float | None = None
    """How likely so much is by chance."""
    drifted: bool = False
    """It counts: the effect is large enough and no accident."""
    compared_with: Literal["reference", "stable"] = "reference"
    """The bundle's reference sample, or the stable model's rows of the same window."""


class EvidenceSpec(Strict):
    """The finding. Never changes: a later one is another object."""

    model_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
    """The model that it is about, by the digest of its bundle."""
    kind: Literal["drift", "performance", "smoke", "fairness"]
    """Which kind of job found it."""
    window_start: AwareDatetime
    """Start of the time that was looked at."""
    window_end: AwareDatetime
    """End of the time that was looked at."""
    verdict: Verdict
    """NoData and Error are neither success nor failure."""
    samples: int = Field(ge=0)
    """Rows of the model under test that the verdict rests on."""
    values: Annotated[tuple[EvidenceValue, ...], Field(max_length=VALUES_MAX)] = ()
    """The numbers behind the verdict."""
    message: str = Field(max_length=MESSAGE_CHARACTERS_MAX)
    """One sentence that a person on call understands."""
    both_arms: bool = False
    """The stable model's input drifted too: the world changed, not the candidate."""
    report: str = Field(default="", max_length=2048)
    """Link or path of the HTML report."""
    job: str = Field(default="", max_length=253)
    """The job that wrote it."""
    created_at: AwareDatetime
    """When the job wrote it, by its own clock."""


class Metadata(Strict):
    """Kubernetes metadata, as far as it is used here; the rest is the API server's."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=253)


class ModelEvidence(Strict):
    """What a monitoring job found about one model over one window of time. Written once by the job, never changed."""

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
    """`drift-<digest8>-<end of window, UTC>`: one name for one finding, so writing it twice is seen.

    The start isn't in it: windows of one model that end alike overlap, and of those one counts.
    """
    stamp = spec.window_end.astimezone(UTC).strftime("%Y%m%dt%H%M%S%f")[:-3]
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
