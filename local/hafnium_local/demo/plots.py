"""The report's plots, as SVG text: weights over time, gate bounds, drift per feature, calibration.

Each function takes typed data and returns one `<svg>`; nothing is read or written here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt

COLOURS = {"Pass": "#2a7f4f", "Fail": "#b3262e", "Inconclusive": "#8a8a8a", "NoData": "#c9a227", "Error": "#7a3fa0"}
_INK, _CANDIDATE, _SHADOW, _GRID = "#22303c", "#c2571a", "#8fa9c4", "#e3e7ea"


@dataclass(frozen=True)
class WeightPoint:
    """The candidate's share of traffic in percent from this moment on, and whether it was mirrored to."""

    time: datetime
    weight: float
    shadow: bool


@dataclass(frozen=True)
class GatePoint:
    """One look at one gate. `lower`, `upper`: confidence bounds of the difference candidate − stable, or None without data."""

    time: datetime
    lower: float | None
    upper: float | None
    verdict: str


@dataclass(frozen=True)
class RolloutTrace:
    """One candidate's way: what the plots need of its status."""

    version: str
    outcome: str
    reason: str
    weights: tuple[WeightPoint, ...]
    gates: dict[str, tuple[GatePoint, ...]]
    margins: dict[str, float]


@dataclass(frozen=True)
class DriftBar:
    """PSI of one feature in one window against one population."""

    name: str
    value: float
    threshold: float | None
    drifted: bool


@dataclass(frozen=True)
class CalibrationCurve:
    """Mean score and observed rate of equal-mass bins."""

    version: str
    mean_score: tuple[float, ...]
    observed_rate: tuple[float, ...]


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg"):]


def _axes(width: float, height: float, title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)
    return figure, axes


def weights_plot(traces: Sequence[RolloutTrace], end: datetime) -> str:
    """Share of traffic of each candidate over time; shadowing is a shaded strip, since it answers nobody."""
    figure, axes = _axes(10, 2.8, "Share of traffic that each candidate answers")
    for trace in traces:
        points = [*trace.weights]
        if not points:
            continue
        times = [p.time for p in points] + [end]
        values = [p.weight for p in points] + [points[-1].weight]
        colour = _CANDIDATE if trace.outcome == "RolledBack" else COLOURS["Pass"]
        axes.step(times, values, where="post", color=colour, linewidth=2, label=f"{trace.version}: {trace.outcome}")
        for p, following in zip(points, [*times[1:]], strict=True):
            if p.shadow:
                axes.axvspan(p.time, following, color=_SHADOW, alpha=0.35, linewidth=0)
                axes.annotate(f"{trace.version} shadow", (p.time, 96), fontsize=7, color=_INK, va="top")
    axes.set_ylim(-3, 104)
    axes.set_ylabel("percent", fontsize=8)
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M:%S"))
    if traces:
        axes.legend(fontsize=8, frameon=False, loc="center left")
    return _svg(figure)


def gates_plot(trace: RolloutTrace) -> str:
    """Bounds of each gate of a rollout, look by look: it passes below the margin and fails above zero."""
    names = [n for n, points in trace.gates.items() if points]
    figure, grid = plt.subplots(max(len(names), 1), 1, figsize=(10, 1.5 * max(len(names), 1) + 0.4), sharex=True, squeeze=False)
    for row, name in enumerate(names):
        axes = grid[row][0]
        axes.set_title(f"{trace.version} · {name}", loc="left", fontsize=9, color=_INK)
        axes.grid(color=_GRID, linewidth=0.8)
        points = trace.gates[name]
        bounded = [p for p in points if p.lower is not None and p.upper is not None]
        if bounded:
            times = [p.time for p in bounded]
            lows = [float(p.lower or 0.0) for p in bounded]
            highs = [float(p.upper or 0.0) for p in bounded]
            axes.fill_between(times, lows, highs, step="post", alpha=0.3, color=_SHADOW, linewidth=0)
            margin = trace.margins.get(name)
            # Around the margin: the first looks' bounds are the whole range and would flatten what matters.
            reach = min(3.0 * margin if margin is not None else 2.5 * max(abs(lows[-1]), abs(highs[-1]), 1e-3), 1.02)
            axes.set_ylim(-reach, reach)
            if margin is not None:
                axes.axhline(margin, color=_INK, linewidth=0.8, linestyle="--")
        axes.axhline(0.0, color=_INK, linewidth=0.8)
        bottom = axes.get_ylim()[0]
        for verdict, colour in COLOURS.items():
            chosen = [p.time for p in points if p.verdict == verdict]
            if chosen:
                axes.scatter(chosen, [bottom] * len(chosen), color=colour, s=14, label=verdict, clip_on=False, zorder=3)
        axes.legend(fontsize=7, frameon=False, loc="upper right", ncols=5)
        axes.tick_params(colors=_INK, labelsize=7)
        axes.xaxis.set_major_formatter(mdates.DateFormatter("%H:%M:%S"))
    if not names:
        grid[0][0].text(0.5, 0.5, f"{trace.version}: no gate was looked at", ha="center")
    figure.tight_layout()
    return _svg(figure)


def drift_plot(title: str, bars: Sequence[DriftBar]) -> str:
    """PSI per feature, largest on top; red is drift, the tick is the contract's threshold."""
    chosen = sorted(bars, key=lambda b: -b.value)[:30]
    figure, axes = _axes(10, 0.26 * max(len(chosen), 2) + 0.9, title)
    for row, bar in enumerate(reversed(chosen)):
        axes.barh(row, bar.value, color=COLOURS["Fail"] if bar.drifted else _SHADOW, height=0.7)
        if bar.threshold is not None:
            axes.plot([bar.threshold, bar.threshold], [row - 0.4, row + 0.4], color=_INK, linewidth=1)
    axes.set_yticks(range(len(chosen)), [b.name for b in reversed(chosen)], fontsize=8)
    axes.set_xlabel("PSI (log scale above 0.2)", fontsize=8)
    axes.set_xscale("symlog", linthresh=0.2)
    axes.set_xlim(left=0)
    return _svg(figure)


def calibration_plot(curves: Sequence[CalibrationCurve]) -> str:
    """Observed rate against mean score of equal-mass bins, log-log since most scores are small; the diagonal is perfect."""
    figure, axes = _axes(5, 4, "Calibration on held-out data")
    floor = 1e-4
    axes.plot([floor, 1], [floor, 1], color=_INK, linewidth=0.8, linestyle="--")
    for curve in curves:
        scores = [max(s, floor) for s in curve.mean_score]
        rates = [max(r, floor) for r in curve.observed_rate]
        axes.plot(scores, rates, marker="o", markersize=4, linewidth=1.2, label=curve.version)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("mean score of the bin", fontsize=8)
    axes.set_ylabel("observed rate", fontsize=8)
    if curves:
        axes.legend(fontsize=8, frameon=False)
    return _svg(figure)
