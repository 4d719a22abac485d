"""Figures of a benchmark: build/bench/NAME.json, a table, and the goals that were missed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

OUT = Path("build/bench")


@dataclass(frozen=True)
class Figure:
    """One number. A goal is a promise; `rounds` holds what each repetition gave."""

    value: float
    unit: str
    better: Literal["higher", "lower"]
    goal: float | None = None
    rounds: tuple[float, ...] = ()

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


def publish(name: str, figures: dict[str, Figure], skipped: Sequence[str] = ()) -> int:
    """Writes the JSON, prints the table and what fell short. Returns the number of missed goals."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "system": platform.system()}
    document = {
        "name": name, "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine,
        "figures": {k: asdict(f) for k, f in figures.items()}, "skipped": list(skipped),
    }
    (OUT / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for key, f in figures.items():
        goal = "" if f.goal is None else f"   goal {'≥' if f.better == 'higher' else '≤'} {f.goal:g}{'' if f.met else '   MISSED'}"
        print(f"{key:<28} {f.value:>10.4g} {f.unit:<6}{goal}")
    for text in skipped:
        print(f"skipped: {text}")
    missed = [k for k, f in figures.items() if not f.met]
    print(f"{OUT / name}.json; goals missed: {', '.join(missed) or 'none'}")
    return len(missed)
