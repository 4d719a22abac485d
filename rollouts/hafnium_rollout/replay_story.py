"""What `hafnium rollout replay` tells: decisions in order, whether they are those that were made, and where "what if" begins."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hafnium_contract.shown_text import one_line
from hafnium_rollout.actions import Event
from hafnium_rollout.errors import RecordError
from hafnium_rollout.objects import ModelRollout
from hafnium_rollout.record import hafnium_version
from hafnium_rollout.record_lines import Gap, RecordedTurn, Start
from hafnium_rollout.replaying import Break, ReplayedTurn, replay

WHO = {"both": "both", "recorded": "recorded", "other": "other", "counterfactual": "other ~"}
"""Whose decision a line is. `~`: the recorded world no longer applies to it."""


@dataclass
class Summary:
    """What a replay comes to."""

    turns: int = 0
    first: datetime | None = None
    last: datetime | None = None
    different: int = 0
    """Turns that did not end in the recorded status."""
    different_at: datetime | None = None
    breaks: int = 0
    version: str = ""
    recorded: str = ""
    """Phase at the end, and why."""
    other: str = ""
    counterfactual_since: datetime | None = None
    """Of the last run."""
    unknown_since: datetime | None = None
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def exact(self) -> bool:
        """Every turn ended as it was recorded."""
        return not self.different


def tell(
    entries: Iterable[Start | RecordedTurn | Gap], other: ModelRollout | None, until: datetime | None, summary: Summary, *,
    keep: bool = False,
) -> Generator[str]:
    """One line per decision, in order. Fills `summary`, which is whole when the last line has come; `keep`: the lines as data, too.

    Raises RecordError when there is nothing to replay.
    """
    for item in replay(_noting_version(entries, summary), other, until):
        if isinstance(item, Break):
            summary.breaks += 1
            when = _time(item.time) if item.time is not None else " " * 20
            yield f"{when}  {'break':<9} {item.message}"
            continue
        _count(item, summary, with_other=other is not None)
        for who, event in _events(item, with_other=other is not None):
            if keep:
                summary.lines.append({"time": item.now.isoformat(), "decision": event.name, "reason": event.reason,
                                      "message": event.message, "whose": who})
            mark = f"{WHO[who]:<9} " if other is not None else ""
            yield f"{_time(item.now)}  {mark}{event.name:<20} {event.message}"
    if not summary.turns:
        raise RecordError("the record holds no turn in this time; see --until, and `hafnium rollout status` for when it began")


def ending(summary: Summary, rules: str = "") -> list[str]:
    """The last lines for people. `rules`: what the other rules are called; '' without them."""
    span = f"{summary.turns} turns from {_time(summary.first)} to {_time(summary.last)}"
    out: list[str] = []
    if summary.exact:
        out.append(f"{span}: every decision is the one that was made")
    else:
        out.append(f"{span}: {summary.different} turns don't end as they were recorded, the first at {_time(summary.different_at)}; "
                   f"Hafnium {summary.version} decided, this is {hafnium_version()}, or the record was changed")
    if summary.breaks:
        out.append(f"{summary.breaks} breaks: turns are missing there")
    out.append(f"recorded: {summary.recorded}")
    if rules:
        out.append(f"with {rules}: {summary.other}")
        if summary.counterfactual_since is not None:
            out.append(f"from {_time(summary.counterfactual_since)} on the weights differ, and the recorded world no longer applies: "
                       "what is marked ~ takes the requests as they came under the recorded weights")
        if summary.unknown_since is not None:
            out.append(f"from {_time(summary.unknown_since)} on nothing is known: no request reached the candidate any more")
    return [one_line(line) for line in out]


def _noting_version(
    entries: Iterable[Start | RecordedTurn | Gap], summary: Summary,
) -> Iterator[Start | RecordedTurn | Gap]:
    for entry in entries:
        if isinstance(entry, Start):
            summary.version = entry.version
        yield entry


def _count(turn: ReplayedTurn, summary: Summary, *, with_other: bool) -> None:
    summary.turns += 1
    summary.first, summary.last = summary.first or turn.now, turn.now
    if not turn.equal:
        summary.different += 1
        summary.different_at = summary.different_at or turn.now
    status = turn.recorded.status
    summary.recorded = f"{status.phase}: {status.message}"
    if not with_other:
        return
    if turn.other is not None:
        summary.other = f"{turn.other.status.phase}: {turn.other.status.message}"
    if turn.world == "recorded":
        summary.counterfactual_since = summary.unknown_since = None
    elif turn.world == "counterfactual":
        summary.counterfactual_since = summary.counterfactual_since or turn.now
    else:
        summary.unknown_since = summary.unknown_since or turn.now


def _events(turn: ReplayedTurn, *, with_other: bool) -> list[tuple[str, Event]]:
    """Whose decision each event is, those of both first."""
    recorded = turn.recorded.events
    if not with_other:
        return [("recorded", e) for e in recorded]
    other = turn.other.events if turn.other is not None else ()
    mark = "other" if turn.world == "recorded" else "counterfactual"
    both = [e for e in recorded if e in other] if turn.world == "recorded" else []
    return [
        *(("both", e) for e in both), *(("recorded", e) for e in recorded if e not in both), *((mark, e) for e in other if e not in both),
    ]


def _time(when: datetime | None) -> str:
    return "" if when is None else f"{when:%Y-%m-%d %H:%M:%S}Z"
