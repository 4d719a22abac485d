"""The demo's report: one HTML file with everything inside it, so that it can be sent and kept."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hafnium_contract.whole_files import write_atomically
from hafnium_local.demo.plots import (
    CalibrationCurve,
    DriftBar,
    RolloutTrace,
    calibration_plot,
    drift_plot,
    gates_plot,
    weights_plot,
)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#22303c;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #e3e7ea}
table{border-collapse:collapse;width:100%;font-size:.9rem} td,th{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #e3e7ea}
th{font-weight:600} td.number{text-align:right;font-variant-numeric:tabular-nums} svg{max-width:100%;height:auto}
.good{color:#2a7f4f;font-weight:600}.bad{color:#b3262e;font-weight:600} code{font-size:.85em}
"""


@dataclass(frozen=True)
class Row:
    """One line of the table of what happened."""

    what: str
    value: str
    good: bool | None = None


@dataclass(frozen=True)
class DriftPanel:
    """The drift evidence shown for one version: title (with its verdict and sentence) and bars."""

    title: str
    message: str
    bars: tuple[DriftBar, ...]


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    subtitle: str
    rows: tuple[Row, ...]
    traces: tuple[RolloutTrace, ...]
    drift: tuple[DriftPanel, ...]
    calibration: tuple[CalibrationCurve, ...]
    story: tuple[tuple[datetime, str], ...]
    end: datetime


def _table(rows: Sequence[Row]) -> str:
    body = "".join(
        f"<tr><th>{html.escape(r.what)}</th>"
        f'<td class="{ {True: "good", False: "bad", None: ""}[r.good] }">{html.escape(r.value)}</td></tr>'
        for r in rows
    )
    return f"<table>{body}</table>"


def render(report: Report) -> str:
    """Report → HTML text, self-contained: no script, no address outside the file."""
    parts = [
        f"<h1>{html.escape(report.title)}</h1><p>{html.escape(report.subtitle)}</p>", "<h2>What happened</h2>", _table(report.rows),
        "<h2>Weights over time</h2>", weights_plot(report.traces, report.end), "<h2>Gates</h2>",
        "<p>The band is a confidence sequence of the difference candidate − stable, valid at every look. A gate passes when the band "
        "is below the margin (dashed) and fails when it is above zero. Dots are the verdicts.</p>",
    ]
    for trace in report.traces:
        outcome = "good" if trace.outcome == "Promoted" else "bad"
        parts.append(f'<h3>{html.escape(trace.version)}: <span class="{outcome}">{html.escape(trace.outcome)}</span></h3>')
        parts.append(f"<p>{html.escape(trace.reason)}</p>")
        parts.append(gates_plot(trace))
    parts.append("<h2>Drift per feature</h2>")
    for panel in report.drift:
        parts.append(f"<p>{html.escape(panel.message)}</p>")
        parts.append(drift_plot(panel.title, panel.bars))
    if not report.drift:
        parts.append("<p>No drift evidence was written.</p>")
    parts += ["<h2>Calibration</h2>", calibration_plot(report.calibration), "<h2>The story</h2>", "<table>"]
    parts += [f"<tr><td><code>{t:%H:%M:%S}</code></td><td>{html.escape(text)}</td></tr>" for t, text in report.story]
    parts.append("</table>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(report.title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_report(report: Report, path: Path) -> Path:
    """Writes the page, and its first plot as `weights.svg`, beside their places and renames them: nobody sees half of one."""
    for target, text in ((path, render(report)), (path.with_name("weights.svg"), weights_plot(report.traces, report.end))):
        write_atomically(target, text)
    return path
