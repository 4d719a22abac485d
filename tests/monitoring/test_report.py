"""The HTML report: Evidently agrees with us, odd columns don't stop it, old ones go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from hafnium_contract.bundle import Bundle
from hafnium_contract.evidence import EvidenceSpec, read_evidence
from hafnium_contract.model_contract import ModelContract
from hafnium_monitoring.errors import WrittenError
from hafnium_monitoring.evidence_places import FolderEvidence, write_with_report
from hafnium_monitoring.report import prune
from hafnium_monitoring.settings import ReportSettings

from .conftest import NOW, START, World, change


@pytest.mark.slow
def test_evidently_gives_our_number_for_every_column(world: World) -> None:
    world.log("candidate", 2_000, change("transaction_amount", lambda v: np.minimum(v * 100, 100_000)))
    world.log("stable", 2_000)
    folder = world.root / "reports"
    outcome = world.run(report=ReportSettings(folder=folder))
    assert outcome.report is not None
    assert outcome.evidence.report == str(outcome.report)
    assert outcome.report.stat().st_size > 1_000_000
    data = json.loads(outcome.report.with_suffix(".json").read_text())
    columns = data["evidently"]["columns"]
    judged = {f.name for f in world.contract.inputs if not f.personal and f.drift.test == "psi"} | {"score"}
    assert {c["column"] for c in columns} == judged
    assert all(c["equal"] for c in columns)
    assert data["notInReport"] == []
    by_name = {c["column"]: c["evidently"] for c in columns}
    ours = {v.name: v.value for v in outcome.evidence.values if v.statistic == "psi" and v.compared_with == "reference"}
    # no value is missing in this column, so that the report's PSI (of present values) is the evidence's
    assert by_name["transaction_amount"] == pytest.approx(ours["transaction_amount"])
    assert by_name["transaction_amount"] > 1
    # and again in the same process, with other columns: Evidently's registry is global
    world.log("candidate", 2_000, change("geo_risk_score", lambda v: np.full_like(v, np.nan)))
    again = world.run(report=ReportSettings(folder=folder, rows_max=500))
    assert again.report is not None


@pytest.mark.slow
def test_a_column_without_values_is_listed_and_the_rest_is_shown(world: World) -> None:
    world.log("candidate", 2_000, change("geo_risk_score", lambda v: np.full_like(v, np.nan)),
              change("channel", lambda v: np.where(np.arange(len(v)) % 5 == 0, -1, v).astype(np.float32)))
    world.log("stable", 2_000)
    outcome = world.run(report=ReportSettings(folder=world.root / "reports"))
    assert outcome.report is not None
    data = json.loads(outcome.report.with_suffix(".json").read_text())
    assert data["notInReport"] == ["geo_risk_score"]
    assert all(c["equal"] for c in data["evidently"]["columns"])
    assert outcome.evidence.verdict == "Fail"


def test_a_report_that_cannot_be_written_leaves_the_verdict(world: World) -> None:
    world.log("candidate", 2_000)
    world.log("stable", 2_000)
    blocked = world.root / "reports"
    blocked.write_text("a file where the folder should be")
    outcome = world.run(report=ReportSettings(folder=blocked))
    assert (outcome.evidence.verdict, outcome.evidence.report, outcome.report) == ("Pass", "", None)


def test_only_the_newest_reports_are_kept(tmp_path: Path) -> None:
    for i in range(5):
        for suffix in (".html", ".json"):
            path = tmp_path / f"drift-aaaaaaaa-{i}z{suffix}"
            path.write_text("x")
            os.utime(path, (1_000 + i, 1_000 + i))
    (tmp_path / "somebody-elses.html").write_text("x")
    prune(tmp_path, 2)
    kept = {p.name for p in tmp_path.iterdir()}
    assert kept == {f"drift-aaaaaaaa-{i}z{s}" for i in (3, 4) for s in (".html", ".json")} | {"somebody-elses.html"}


def finding(folder: Path, when: datetime, hours: int = 0) -> EvidenceSpec:
    """With a report written at `when`; of a window `hours` later than the first."""
    html = folder / f"drift-aaaaaaaa-{when:%H%M%S}.html"
    folder.mkdir(exist_ok=True)
    for path in (html, html.with_suffix(".json")):
        path.write_text("x")
        os.utime(path, (when.timestamp(), when.timestamp()))
    return EvidenceSpec(
        model_digest="sha256:" + "ab" * 32, kind="drift", window_start=START + timedelta(hours=hours), job="j", created_at=when,
        window_end=NOW + timedelta(hours=hours), verdict="Pass", samples=1, message="m", report=str(html),
    )


def test_old_reports_go_when_evidence_is_written_and_none_goes_for_evidence_that_is_refused(tmp_path: Path) -> None:
    place, reports = FolderEvidence(tmp_path / "evidence"), tmp_path / "reports"
    first, second, third = (finding(reports, NOW + timedelta(minutes=i), hours=i) for i in range(3))
    write_with_report(place, second, 3)
    with pytest.raises(WrittenError):
        write_with_report(place, finding(reports, NOW + timedelta(minutes=9), hours=1), 3)
    assert {str(p) for p in reports.glob("*.html")} == {first.report, second.report, third.report}
    write_with_report(place, third, 2)
    assert {p.name for p in reports.iterdir()} == {Path(e.report).with_suffix(s).name for e in (second, third) for s in (".html", ".json")}


def test_an_old_report_that_cannot_be_removed_costs_no_evidence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = finding(tmp_path / "reports", NOW)
    (tmp_path / "reports" / "drift-bbbbbbbb-1.html").mkdir()
    os.utime(tmp_path / "reports" / "drift-bbbbbbbb-1.html", (1_000, 1_000))
    write_with_report(FolderEvidence(tmp_path / "evidence"), spec, 1)
    assert len(list(read_evidence(tmp_path / "evidence"))) == 1
    assert "old reports can't be removed" in caplog.text


def test_without_a_report_no_heavy_library_is_imported(
    world: World, contract: ModelContract, candidate_bundle: Bundle,
) -> None:
    world.log("candidate", 1_000)
    world.log("stable", 1_000)
    code = (
        "import sys\nfrom hafnium_monitoring.__main__ import main\n"
        "status = main(sys.argv[1:])\n"
        "loaded = [m for m in ('evidently', 'torch', 'sklearn', 'mlflow', 'feast') if m in sys.modules]\n"
        "assert not loaded, loaded\nsys.exit(status)"
    )
    arguments = [
        "drift", "--bundle", str(world.candidate.path), "--stable-bundle", str(world.stable.path), "--log", *map(str, world.logs),
        "--evidence", str(world.root / "evidence"), "--window", "1h", "--end", "2026-01-15T13:00:00Z", "--no-report",
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Pass: ")
