"""Line plots as SVG text, by hand: two kinds of plot need no library, and the operator's image has none."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from hafnium_rollout.gate_spec import Gate
from hafnium_rollout.status import GatePoint, HistoryPoint

WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 10, 30
VERDICT_COLOURS = {"Pass": "#2a7f4f", "Fail": "#b3262e", "Inconclusive": "#8a97a3", "NoData": "#c98a00", "Error": "#7a3fa0"}
_INK, _GRID, _DESIRED, _OBSERVED, _BAND = "#22303c", "#e3e7ea", "#9aa7b2", "#1f5fa8", "#cfe0f3"
_T = TypeVar("_T")
_POINTS_MAX = 600
"""Of one line: more are not seen on paper, and a file should be mailable."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Data → points of a plot of HEIGHT pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels; what lies outside is drawn at the border."""
        (x0, x1), (y0, y1) = self.x, self.y
        px = _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - x0) / ((x1 - x0) or 1.0)
        py = _TOP + (self.height - _TOP - _BOTTOM) * (1.0 - (min(max(y, y0), y1) - y0) / ((y1 - y0) or 1.0))
        return round(px, 1), round(py, 1)

    def frame(self, x_text: Callable[[float], str], y_text: Callable[[float], str], x_name: str) -> list[str]:
        """Grid, ticks and names."""
        out: list[str] = []
        for value in ticks(*self.y, 5):
            px, py = self.at(self.x[0], value)
            out.append(f'<line x1="{px}" y1="{py}" x2="{WIDTH - _RIGHT}" y2="{py}" stroke="{_GRID}"/>')
            out.append(_text(px - 6, py + 4, y_text(value), "end"))
        for value in ticks(*self.x, 6):
            px, py = self.at(value, self.y[0])
            out.append(_text(px, py + 14, x_text(value), "middle"))
        out.append(_text(WIDTH - _RIGHT, self.height - 3, x_name, "end"))
        return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values between low and high, about `count`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def _line(points: Iterable[tuple[float, float]], colour: str, *, dash: str = "", width: float = 1.5) -> str:
    joined = " ".join(f"{x:g},{y:g}" for x, y in points)
    more = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"{more}/>' if joined else ""


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title, quote=True)}">'
            f'<title>{html.escape(title)}</title>{"".join(parts)}</svg>')


def thinned(items: Sequence[_T]) -> list[_T]:
    """At most _POINTS_MAX of them, the last always."""
    every = max(1, math.ceil(len(items) / _POINTS_MAX))
    return [*items[:-1:every], *items[-1:]]


def weights_plot(history: Sequence[HistoryPoint]) -> str:
    """Wanted and observed percent of the candidate over time, with what happened as ticks below. '' for fewer than two points."""
    if len(history) < 2:
        return ""
    start, end = history[0].time, history[-1].time
    axes = Axes((0.0, max((end - start).total_seconds(), 1.0)), (0.0, 100.0), 210)
    seconds = [(p.time - start).total_seconds() for p in history]
    parts = axes.frame(lambda x: _clock(start, end, x), lambda y: f"{y:g} %", "time (UTC)")
    for a, b, point in zip(seconds, [*seconds[1:], seconds[-1]], history, strict=True):
        if point.shadow:
            (x0, y0), (x1, y1) = axes.at(a, 100), axes.at(b, 0)
            parts.append(f'<rect x="{x0}" y="{y0}" width="{max(x1 - x0, 0.5):.1f}" height="{y1 - y0:.1f}" fill="#f1ecf7"/>')
    desired = [(s, p.weight_desired) for s, p in zip(seconds, history, strict=True) if p.weight_desired is not None]
    parts.append(_line(_stairs(axes, [(s, float(w)) for s, w in desired]), _DESIRED, dash="5 3", width=2))
    parts.append(_line(_stairs(axes, [(s, float(p.weight)) for s, p in zip(seconds, history, strict=True)]), _OBSERVED, width=2))
    for s, p in zip(seconds, history, strict=True):
        if p.event != "Look":
            x, y = axes.at(s, 0)
            parts.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y - 7}" stroke="{"#b3262e" if p.alert else _INK}" stroke-width="1.5">'
                         f"<title>{html.escape(f'{p.time:%H:%M:%S} {p.event}: {p.message}')}</title></line>")
    parts += [_text(_LEFT + 8, _TOP + 12, "observed at the gateway", "start", _OBSERVED),
              _text(_LEFT + 170, _TOP + 12, "wanted (dashed)", "start", "#6b7882"),
              _text(_LEFT + 285, _TOP + 12, "shadow (shaded): copies, no live answers", "start", "#7a5aa0")]
    return _svg(210, "Weight of the candidate over time, wanted and observed", parts)


def _stairs(axes: Axes, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A value holds until the next one. Only corners are kept."""
    out: list[tuple[float, float]] = []
    last: float | None = None
    for i, (x, y) in enumerate(points):
        if y != last or i == len(points) - 1:
            if last is not None:
                out.append(axes.at(x, last))
            out.append(axes.at(x, y))
            last = y
    return out


def _clock(start: datetime, end: datetime, seconds: float) -> str:
    moment = datetime.fromtimestamp(start.timestamp() + seconds, tz=start.tzinfo)
    return f"{moment:%d %b %H:%M}" if (end - start).total_seconds() > 86_400 else f"{moment:%H:%M:%S}"


@dataclass(frozen=True, slots=True)
class GateTrace:
    """A gate over the samples of a run: samples add up over the steps."""

    gate: Gate
    runs: tuple[tuple[tuple[float, GatePoint], ...], ...]
    """Per step: evidence for Pass begins anew, so lines don't go across."""

    @property
    def points(self) -> list[tuple[float, GatePoint]]:
        return [p for run in self.runs for p in run]

    @property
    def edges(self) -> list[float]:
        """Samples at which a new step began."""
        return [run[0][0] for run in self.runs[1:]]


def gate_trace(gate: Gate, history: Sequence[HistoryPoint]) -> GateTrace:
    """The gate's points of a run's history."""
    runs: list[list[tuple[float, GatePoint]]] = [[]]
    base, before = 0.0, 0
    for point in history:
        if point.event == "StepEntered" and runs[-1]:
            runs.append([])
        for g in point.gates:
            if g.name != gate.name:
                continue
            if g.samples < before:
                base += before
            before = g.samples
            runs[-1].append((base + g.samples, g))
    return GateTrace(gate, tuple(tuple(r) for r in runs if r))


def bounds_plot(trace: GateTrace) -> str:
    """Bounds of candidate − stable over samples, with margin and verdicts. '' where the gate has no bounds."""
    known = [(x, p) for x, p in trace.points if p.upper is not None or p.lower is not None]
    if len(known) < 2 or not known[-1][0]:
        return ""
    margin, harmless = trace.gate.margin, trace.gate.harmless
    late = [v for x, p in known if x >= 0.15 * known[-1][0] for v in (p.lower, p.upper) if v is not None and math.isfinite(v)]
    high = min(max([*late, 1.6 * margin]), 8 * margin)
    low = max(min([*late, -0.6 * margin]), -8 * margin)
    axes = Axes((0.0, max(x for x, _ in known) or 1.0), (low, high), 200)
    parts = axes.frame(_count, lambda y: f"{100 * y:.3g}", "candidate's samples")
    for x in trace.edges:
        (px, y0), (_, y1) = axes.at(x, high), axes.at(x, low)
        parts.append(f'<line x1="{px}" y1="{y0}" x2="{px}" y2="{y1}" stroke="{_DESIRED}" stroke-dasharray="2 3"/>')
    for run in trace.runs:
        both = [(x, p.lower, p.upper) for x, p in thinned(run) if p.lower is not None and p.upper is not None]
        if len(both) > 1:
            edge = [axes.at(x, up) for x, _, up in both] + [axes.at(x, lo) for x, lo, _ in reversed(both)]
            joined = " ".join(f"{x:g},{y:g}" for x, y in edge)
            parts.append(f'<polygon points="{joined}" fill="{_BAND}" fill-opacity="0.6"/>')
        parts.append(_line([axes.at(x, p.upper) for x, p in thinned(run) if p.upper is not None], _OBSERVED))
        parts.append(_line([axes.at(x, p.lower) for x, p in thinned(run) if p.lower is not None], _OBSERVED))
    for value, colour, dash, name in ((margin, "#b3262e", "6 4", "margin"), (0.0, _INK, "", "equal"), (
            harmless, "#c98a00", "2 2", "harmless")):
        if name == "harmless" and harmless in (0.0, margin):
            continue
        (x0, y), (x1, _) = axes.at(axes.x[0], value), axes.at(axes.x[1], value)
        more = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="{colour}"{more}/>')
        parts.append(_text(x1 - 4, y - 4, name, "end", colour))
    parts += _verdict_dots(axes, known, lambda _: low)
    return _svg(200, f"Gate {trace.gate.name}: bounds of the difference over samples", parts)


def statistic_plot(trace: GateTrace, *, name: str, line: float | None, line_name: str) -> str:
    """A gate's statistic over samples with the line that it is held against. '' for fewer than two points."""
    known = [(x, p) for x, p in trace.points if math.isfinite(p.statistic)]
    if len(known) < 2 or not known[-1][0]:
        return ""
    values = [p.statistic for _, p in known] + ([line] if line is not None else [])
    low, high = min(0.0, *values), max(values)
    axes = Axes((0.0, max(x for x, _ in known) or 1.0), (low, (high or 1.0) * 1.12), 150)
    parts = axes.frame(_count, lambda y: f"{y:.3g}", "candidate's samples")
    if line is not None:
        (x0, y), (x1, _) = axes.at(0.0, line), axes.at(axes.x[1], line)
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="#b3262e" stroke-dasharray="6 4"/>')
        parts.append(_text(x1 - 4, y - 4, line_name, "end", "#b3262e"))
    for run in trace.runs:
        parts.append(_line([axes.at(x, p.statistic) for x, p in thinned(run) if math.isfinite(p.statistic)], _OBSERVED))
    parts += _verdict_dots(axes, known, lambda p: p.statistic)
    return _svg(150, f"Gate {trace.gate.name}: {name} over samples", parts)


def _verdict_dots(axes: Axes, known: Sequence[tuple[float, GatePoint]], y: Callable[[GatePoint], float]) -> list[str]:
    out: list[str] = []
    for x, p in thinned(known):
        px, py = axes.at(x, y(p))
        out.append(f'<circle cx="{px}" cy="{py}" r="2.2" fill="{VERDICT_COLOURS[p.verdict]}"/>')
    return out


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
