"""The report stands alone and shows what it was given."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

from hafnium_local.demo.plots import CalibrationCurve, DriftBar, GatePoint, RolloutTrace, WeightPoint
from hafnium_local.demo.report import DriftPanel, Report, Row, write_report

START = datetime(2026, 5, 4, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def trace(version: str, outcome: str) -> RolloutTrace:
    return RolloutTrace(
        version, outcome, "errors: lower bound 0.02 > 0",
        (WeightPoint(at(0), 0, True), WeightPoint(at(10), 5, False), WeightPoint(at(20), 0, False)),
        {"errors": (GatePoint(at(5), None, None, "NoData"), GatePoint(at(15), 0.02, 0.2, "Fail")), "silent": ()},
        {"errors": 0.05},
    )


def page(tmp_path: Path, **changes: object) -> str:
    values: dict[str, object] = {
        "title": "Demo <b>", "subtitle": "fault units", "rows": (Row("v2", "Promoted", True), Row("lost", "3", False)),
        "traces": (trace("v2", "Promoted"), trace("v3", "RolledBack")),
        "drift": (DriftPanel("v3", "amount drifted", (DriftBar("amount", 1.4, 0.1, True), DriftBar("b", 0.0, None, False))),),
        "calibration": (CalibrationCurve("v1", (0.001, 0.2), (0.0, 0.25)),), "story": ((at(1), "v2 & v3"),), "end": at(30),
    } | changes
    return write_report(Report(**values), tmp_path / "report.html").read_text()  # type: ignore[arg-type]


def test_the_report_needs_nothing_outside_itself(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 5, "weights, gates of both, drift, calibration"
    for svg in svgs:
        ElementTree.fromstring(svg)  # noqa: S314 - our own text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "weights.svg"]


def test_the_report_says_what_it_was_given_and_escapes_it(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "Demo &lt;b&gt;" in text
    assert "v2 &amp; v3" in text
    assert '<td class="bad">3</td>' in text
    assert "errors: lower bound 0.02 &gt; 0" in text


def test_a_demo_that_ended_early_still_has_a_report(tmp_path: Path) -> None:
    text = page(tmp_path, traces=(), drift=(), calibration=(), story=(), rows=())
    assert "No drift evidence was written" in text
