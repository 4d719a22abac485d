"""What callers say about a request: its id and W3C's trace context, checked before any of it goes further.

Both come from outside and end in header lines, logs and spans. What is malformed (over-long, control characters, repeated, not the
standard's form) counts as not given: an id is then drawn anew, and a trace begins anew or not at all. It is never passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hafnium_contract.errors import InputError
from hafnium_contract.wire import REQUEST_ID_HEADER

TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
REQUEST_ID = REQUEST_ID_HEADER.encode()
REQUEST_ID_CHARS_MAX = 256
"""A UUID has 36; whoever packs more into an id packs a document."""
REQUEST_IDS_BYTES_MAX = 6 * 1024
"""Ids of a batch in one header line: UUIDs of 128 rows take 4.7 kB, and proxies commonly take lines up to 8 kB."""
TRACESTATE_BYTES_MAX = 512
"""What the standard demands to be passed on; a longer one is dropped, which it allows."""
_TRACESTATE_MEMBERS_MAX = 32
_ID = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_PARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[\x20-\x7e]*)?")
_KEY = rb"[a-z0-9][_0-9a-z\-*/@]{0,255}"
_MEMBER = re.compile(rb"[ \t]*(?:" + _KEY + rb"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e])?[ \t]*")
_LOW_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's span."""

    trace_id: int
    span_id: int
    sampled: bool


@dataclass(frozen=True)
class Sampling:
    """Which traces are recorded, as OTEL_TRACES_SAMPLER says: all six samplers of the standard are these two values."""

    bound: int
    """A trace that begins here is recorded when the low 64 bits of its id are below it: OpenTelemetry's own rule, so that servers
    that sample for themselves agree."""
    parent_based: bool
    """A trace that began elsewhere is recorded when the caller records it."""

    def keeps(self, trace_id: int, parent: TraceParent | None) -> bool:
        """Whether the trace is recorded."""
        if parent is not None and self.parent_based:
            return parent.sampled
        return trace_id & _LOW_64 < self.bound


def sampling_of(env: Mapping[str, str]) -> Sampling:
    """OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG → Sampling. Raises InputError for what is no sampler."""
    name = env.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
    root = name.removeprefix("parentbased_")
    if root == "traceidratio":
        given = env.get("OTEL_TRACES_SAMPLER_ARG", "").strip() or "1"
        try:
            rate = float(given)
        except ValueError:
            rate = -1.0
        if not 0.0 <= rate <= 1.0:
            raise InputError(f"OTEL_TRACES_SAMPLER_ARG: expected a share from 0 to 1, got {given[:40]!r}")
        bound = round(rate * 2**64)
    elif root in ("always_on", "always_off"):
        bound = 2**64 if root == "always_on" else 0
    else:
        known = ", ".join(p + r for p in ("", "parentbased_") for r in ("always_on", "always_off", "traceidratio"))
        raise InputError(f"OTEL_TRACES_SAMPLER: expected one of {known}, got {name[:40]!r}")
    return Sampling(bound, name.startswith("parentbased_"))


def request_id_of(value: bytes | None) -> str:
    """The caller's id, or '' when there is none that could be passed on: 1 to 256 visible ASCII characters, spaces inside."""
    if not value or len(value) > REQUEST_ID_CHARS_MAX or _ID.fullmatch(value) is None:
        return ""
    return value.decode("ascii")


def request_ids_of(value: bytes | None) -> str:
    """The same for a line that may have the ids of a whole batch."""
    if not value or len(value) > REQUEST_IDS_BYTES_MAX or _ID.fullmatch(value) is None:
        return ""
    return value.decode("ascii")


def id_line(ids: Iterable[str], count: int) -> bytes:
    """Header line with these ids, separated by commas; those that would make it too long are counted behind a plus sign."""
    kept: list[str] = []
    room = REQUEST_IDS_BYTES_MAX - len(",+1000000")
    for one in ids:
        room -= len(one) + 1
        if room < 0:
            kept.append(f"+{count - len(kept)}")
            break
        kept.append(one)
    return b"%s: %s\r\n" % (REQUEST_ID, ",".join(kept).encode("ascii", "replace"))


def traceparent_of(value: bytes | None) -> TraceParent | None:
    """The caller's span; None when there is none that can be read. Versions that don't exist yet are read as the standard says."""
    match = None if value is None else _PARENT.fullmatch(value)
    if match is None or (match[5] is not None and match[1] == b"00"):
        return None
    return TraceParent(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))


def tracestate_of(value: bytes | None) -> bytes:
    """What other tracing systems added, or b'' when it is not of the standard's form or longer than has to be passed on."""
    if not value or len(value) > TRACESTATE_BYTES_MAX:
        return b""
    members = value.split(b",")
    if len(members) > _TRACESTATE_MEMBERS_MAX or not all(_MEMBER.fullmatch(m) for m in members):
        return b""
    return value


def trace_lines(headers: Mapping[bytes, bytes]) -> bytes:
    """Header lines that hand the caller's trace on unchanged: what a server does that records nothing itself."""
    value = headers.get(TRACEPARENT)
    if value is None:
        return b""
    match = _PARENT.fullmatch(value)
    if match is None or (match[5] is not None and match[1] == b"00"):
        return b""
    lines = b"%s: 00-%s-%s-%s\r\n" % (TRACEPARENT, match[2], match[3], match[4])
    state = tracestate_of(headers.get(TRACESTATE))
    return lines + b"%s: %s\r\n" % (TRACESTATE, state) if state else lines


def without_repeated(pairs: Iterable[tuple[bytes, bytes]], headers: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """`headers` (name → value, of `pairs`) without an id or a traceparent that came more than once: nobody knows which one is meant.

    Several lines of tracestate are one list, by the standard. Changes `headers` and returns it.
    """
    states = [value for name, value in pairs if name == TRACESTATE]
    if len(states) > 1:
        headers[TRACESTATE] = b",".join(states)
    for name in (REQUEST_ID, TRACEPARENT):
        if name in headers and sum(1 for key, _ in pairs if key == name) > 1:
            del headers[name]
    return headers
