"""What a demo has shown, as a table and as an exit status. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hafnium_local.demo.plan import EXPECTED_GATES, FaultKind
from hafnium_local.demo.report import Row
from hafnium_local.demo.traces import Ended


@dataclass(frozen=True)
class Verdict:
    """`rows`: the table. `wrong`: each thing that went differently, as a sentence; empty means that the demo showed its point."""

    rows: tuple[Row, ...]
    wrong: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.wrong


def judge(fault: FaultKind, v2: Ended | None, v3: Ended | None, replay: dict[str, Any], seconds: float) -> Verdict:
    """`v2`, `v3`: how their rollouts ended, None when they did not. `replay`: the summary of the load."""
    wrong: list[str] = []
    promoted = v2 is not None and v2.outcome == "Promoted"
    if not promoted:
        wrong.append(f"v2 was not promoted: {v2.message if v2 is not None else 'its rollout did not end'}")
    rejected = v3 is not None and v3.outcome == "RolledBack"
    if not rejected:
        wrong.append(f"v3 ({fault}) was not rejected: {v3.message if v3 is not None else 'its rollout did not end'}")
    expected = EXPECTED_GATES[fault]
    right = v3 is not None and bool(set(v3.gates) & set(expected))
    if rejected and not right and v3 is not None:
        wrong.append(f"v3 was rejected for another reason ({', '.join(v3.gates)}) than the fault {fault!r} gives ({' or '.join(expected)})")
    answered, lost = int(replay.get("answered", 0)), int(replay.get("lost", 0)) + int(replay.get("unanswered", 0))
    failed = int(replay.get("failed", 0)) + int(replay.get("refused", 0))
    if answered == 0:
        wrong.append("no request was answered")
    if lost:
        wrong.append(f"{lost} requests were lost")
    if failed:
        wrong.append(f"{failed} requests got an error for an answer: {replay.get('last_error', '')}")
    by_version: dict[str, int] = replay.get("by_version", {})
    rows = (
        Row("v2, trained on more data", _outcome(v2), promoted),
        Row(f"v3, with the fault {fault!r}", _outcome(v3), rejected and right),
        Row("v3 was stopped by", ", ".join(v3.gates) if v3 is not None else "–", right),
        Row("requests answered", f"{answered:,}", answered > 0),
        Row("requests lost", str(lost), lost == 0),
        Row("answers that were errors", str(failed), failed == 0),
        Row("attempts that a retry saved", str(replay.get("retries", 0))),
        Row("answers by the faulty v3", f"{by_version.get('v3', 0):,} of {answered:,}"),
        Row("answers by version", ", ".join(f"{v}: {n:,}" for v, n in sorted(by_version.items())) or "–"),
        Row("latency p50, p95, p99", ", ".join(_ms(replay.get(k)) for k in ("p50_ms", "p95_ms", "p99_ms"))),
        Row("the whole demo took", f"{seconds:.0f} s"),
    )
    return Verdict(rows, tuple(wrong))


def _outcome(found: Ended | None) -> str:
    if found is None:
        return "did not end"
    return {"Promoted": "promoted", "RolledBack": "rejected, traffic went back"}.get(found.outcome, found.outcome) + f": {found.message}"


def _ms(value: Any) -> str:
    return f"{value:.0f} ms" if isinstance(value, int | float) else "–"
