"""Texts, names and limits that fields of the objects share. Whatever a user writes has a size limit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hafnium_contract.model_contract import MODEL_NAME_PATTERN

TEXT_CHARACTERS_MAX = 1_000
USER_CHARACTERS_MAX = 512
"""Kubernetes sets no limit for user names; those of OIDC (issuer and subject) stay below this."""


def each_once(values: tuple[str, ...]) -> tuple[str, ...]:
    """Validator: refuses a value that is there twice, by name."""
    if len(set(values)) != len(values):
        raise ValueError(f"named twice: {', '.join(sorted({v for v in values if values.count(v) > 1}))}")
    return values


Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71)]
Name = Annotated[str, Field(pattern=MODEL_NAME_PATTERN, max_length=42)]
Stage = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", max_length=63)]
"""A kind of approval, such as validation or security. RBAC names it, so it is a DNS label."""
User = Annotated[str, Field(min_length=1, max_length=USER_CHARACTERS_MAX)]
Hostname = Annotated[str, Field(
    pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
