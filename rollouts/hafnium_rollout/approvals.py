"""Which approvals count: pure, and asked by every backend, so that one machine and a cluster have the same rule.

On a cluster admission policies (kustomize/base/access) already refuse an approval in another's name or by who trained the model.
This is the second line: approvals that were made before the ModelRollout named its trainer, or while a policy was missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hafnium_rollout.objects import ApprovalSpec, ModelRollout
from hafnium_rollout.status import RolloutStatus

REFUSED_MAX = 10


@dataclass(frozen=True, slots=True)
class Counted:
    """Stages that are approved, and for people which approvals don't count and why."""

    stages: frozenset[str] = frozenset()
    refused: tuple[str, ...] = ()


def refusal(approver: str, trained_by: str) -> str:
    """Why this approver's word doesn't count, as the end of a sentence; empty when it does. An unknown trainer (`""`) could be anybody."""
    if not trained_by:
        return ": it isn't known who trained this model"
    return ", who trained this model" if approver == trained_by else ""


def count(approvals: Iterable[ApprovalSpec], digest: str, trained_by: str) -> Counted:
    """Approvals of this digest by anyone but who trained it."""
    stages: set[str] = set()
    refused: list[str] = []
    for a in approvals:
        if a.model_digest != digest:
            continue
        if why := refusal(a.approver, trained_by):
            refused.append(f"{a.stage} by {a.approver}{why}")
        else:
            stages.add(a.stage)
    return Counted(frozenset(stages), tuple(sorted(set(refused)))[:REFUSED_MAX])


def candidate_of(rollout: ModelRollout, status: RolloutStatus) -> tuple[str, str]:
    """Digest and trainer of the model that approvals are needed for: the one under way, which a queued one doesn't replace.

    Whoever was named as its trainer when it came stays so: naming another one on the way must not make an approval count.
    """
    model, candidate = rollout.spec.model, status.candidate
    if candidate is None:
        return model.digest, model.trained_by or ""
    return candidate.digest, candidate.trained_by or (model.trained_by or "" if candidate.digest == model.digest else "")
