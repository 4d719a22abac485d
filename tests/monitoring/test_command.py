"""`python -m hafnium_monitoring`: exit statuses and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hafnium_contract.evidence import read_evidence
from hafnium_monitoring.__main__ import main

from .conftest import World, change

WINDOW = ("--window", "1h", "--end", "2026-01-15T13:00:00Z", "--no-report")


def drift(world: World, *more: str) -> int:
    return main(["drift", "--bundle", str(world.candidate.path), "--stable-bundle", str(world.stable.path),
                 "--log", str(world.logs[0]), "--log", str(world.logs[1]), "--evidence", str(world.root / "evidence"),
                 *WINDOW, *more])


def test_pass_ends_with_0_and_names_the_evidence(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.log("candidate", 1_200)
    world.log("stable", 1_200)
    assert drift(world) == 0
    first, path = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("Pass: ")
    assert Path(path).is_file()


def test_fail_and_error_end_with_1(world: World) -> None:
    world.log("candidate", 1_200, change("geo_risk_score", lambda v: v * 0))
    world.log("stable", 1_200)
    assert drift(world) == 1
    next(world.logs[0].glob("date=*/*/part-*.parquet")).write_bytes(b"")
    assert drift(world, "--end", "2026-01-15T13:00:01Z") == 1
    found = [e.spec.verdict for e in read_evidence(world.root / "evidence") if not isinstance(e, Exception)]
    assert found == ["Fail", "Error"]


def test_no_data_ends_with_0(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert drift(world, "--min-rows", "500", "--looks", "3") == 0
    assert capsys.readouterr().out.startswith("NoData: ")


def test_the_same_window_twice_is_refused_since_evidence_never_changes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert drift(world) == 0
    assert drift(world) == 2
    assert "never changed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["drift", "--bundle", "b"], ["drift", "--state", "s"], ["drift", "--bundle", "/nowhere", "--log", "l", "--evidence", "e"],
    ["performance", "--bundle", "/nowhere", "--log", "l", "--evidence", "e", "--window", "1h", "--labels", "x"],
    ["drift", "--every", "1s", "--bundle", "/nowhere", "--log", "l", "--evidence", "e"],
    ["drift", "--every", "1s", "--rollouts", "--log", "l"],
])
def test_what_is_not_given_or_not_there_ends_with_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    [], ["drift", "--window", "1 hour"], ["drift", "--window", "0s"], ["drift", "--min-rows", "0"], ["drift", "--alpha", "1"],
    ["drift", "--end", "2026-01-15T13:00:00"], ["performance"], ["drift", "--end", "0005-01-01T00:00:00Z"],
    ["drift", "--end", "9999-12-31T23:59:59Z"], ["drift", "--window", "9999999999999d"],
])
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_performance_writes_evidence(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.log("stable", 10)
    status = main(["performance", "--bundle", str(world.candidate.path), "--log", str(world.logs[0]), "--evidence",
                   str(tmp_path / "e"), "--window", "1h", "--end", "2026-01-15T13:00:00Z", "--labels", str(tmp_path / "none.csv")])
    assert status == 0
    assert capsys.readouterr().out.startswith("NoData: no row")


@pytest.mark.parametrize(("more", "words"), [
    (("--lag", "1h"), "--lag is for --rollouts"), (("--every", "1s", "--lag", "1h"), "--lag is for --rollouts"),
    (("--every", "1s", "--evidence", "kubernetes"), "--every writes to a folder"),
])
def test_arguments_that_would_be_ignored_are_refused(
    more: tuple[str, ...], words: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world.root)
    before = list(world.root.iterdir())
    assert drift(world, *more) == 2
    assert words in capsys.readouterr().err
    assert list(world.root.iterdir()) == before


def test_an_evidence_folder_that_is_a_file_ends_with_2(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.root / "evidence").write_text("a file")
    assert drift(world) == 2
    assert "can't be used as an evidence folder" in capsys.readouterr().err


def test_a_full_disk_ends_with_2_and_the_verdict_is_not_lost(world: World) -> None:
    world.log("candidate", 1_200, change("geo_risk_score", lambda v: v * 0))
    world.log("stable", 1_200)
    code = (
        "import resource, sys\nfrom hafnium_monitoring.__main__ import main\n"
        "before = resource.getrlimit(resource.RLIMIT_FSIZE)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))\n"
        "status = main(sys.argv[1:])\n"
        # Lifted again, or coverage couldn't write what it measured here
        "resource.setrlimit(resource.RLIMIT_FSIZE, before)\nsys.exit(status)"
    )
    arguments = ["drift", "--bundle", str(world.candidate.path), "--stable-bundle", str(world.stable.path), "--log",
                 *map(str, world.logs), "--evidence", str(world.root / "evidence"), *WINDOW]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("Fail: ")
    assert "evidence can't be written (File too large)" in done.stderr
    assert "Fail: the candidate's inputs differ" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (world.root / "evidence").iterdir()] == [".drift.lock"]


@pytest.mark.slow
def test_a_refused_run_leaves_the_report_of_the_evidence_that_is_there(world: World) -> None:
    world.log("candidate", 1_200)
    world.log("stable", 1_200)
    arguments = ["drift", "--bundle", str(world.candidate.path), "--stable-bundle", str(world.stable.path), "--log",
                 *map(str, world.logs), "--evidence", str(world.root / "evidence"), *WINDOW[:-1], "--keep-reports", "1"]
    assert main(arguments) == 0
    [found] = read_evidence(world.root / "evidence")
    assert not isinstance(found, Exception)
    report = Path(found.spec.report).with_suffix(".json")
    before = report.read_bytes()
    world.log("candidate", 1_200, change("geo_risk_score", lambda v: v * 0))
    assert main(arguments) == 2
    assert report.read_bytes() == before
    assert json.loads(before)["evidence"]["verdict"] == "Pass"
    assert len(list(report.parent.iterdir())) == 2
