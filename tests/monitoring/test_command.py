"""`python -m hafnium_monitoring`: exit statuses and what is said."""

from __future__ import annotations

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
])
def test_what_is_not_given_or_not_there_ends_with_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    [], ["drift", "--window", "1 hour"], ["drift", "--window", "0s"], ["drift", "--min-rows", "0"], ["drift", "--alpha", "1"],
    ["drift", "--end", "2026-01-15T13:00:00"], ["performance"],
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
