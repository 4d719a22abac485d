"""What one client may cost a server. Apart from the protocol that applies it, since settings must not load uvicorn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionLimits:
    """What one client may cost. The settings of predictor and transformer have the reasons."""

    read_timeout_s: float = 10.0
    write_timeout_s: float = 10.0
    write_total_timeout_s: float = 60.0
    head_bytes_max: int = 64 * 1024
    connections_max: int = 1000
