"""The loop: disjoint windows, following the routes, going on after errors, and ending when it is told to."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from hafnium_contract.bundle import Bundle
from hafnium_contract.evidence import EvidenceSpec, read_evidence
from hafnium_monitoring.errors import StateError
from hafnium_monitoring.loop import FLUSH_LAG_S_DEFAULT, DriftLoop, FixedTargets, StateFolder, Target
from hafnium_monitoring.settings import DriftRules, LoopSettings, ReportSettings

from .conftest import START, Matrix, write_log

SETTINGS = LoopSettings(every_s=10, window_s_max=60, log_lag_s=2, settle_s=5, rules=DriftRules(min_rows=500, looks=10))


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@dataclass
class State:
    """A state folder as `hafnium up` keeps it."""

    folder: Path
    bundles: dict[str, Bundle]
    population: Matrix
    count: int = field(default=0)

    def services(self) -> None:
        listed = [{"name": n, "modelName": "unified-risk", "modelVersion": b.manifest.model_version,
                   "modelDigest": b.manifest.digest, "ready": True} for n, b in self.bundles.items()]
        self.write("services.json", json.dumps({"services": listed}))
        for name, bundle in self.bundles.items():
            uri = bundle.path.resolve().as_uri()
            self.write(f"objects/InferenceService-{name}.yaml", yaml.safe_dump(
                {"metadata": {"name": name}, "spec": {"predictor": {"model": {"storageUri": uri}}}}))

    def route(self, stable: str | None, candidate: str | None, weight: int = 5, shadow: bool = False) -> None:
        route: dict[str, Any] = {"name": "risk", "stable": stable, "candidate": candidate, "weight": weight, "shadow": shadow}
        self.write("routes/risk.json", json.dumps(route))

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}")
        staging.write_text(text)
        staging.replace(path)

    def traffic(self, service: str, arm: str, rows: int, start: datetime, seconds: float) -> None:
        self.count += 1
        matrix = self.population[self.count * 1_000 : self.count * 1_000 + rows]
        folder = self.folder / "inference-log" / service
        write_log(folder, self.bundles[service], matrix, arm, start=start, seconds=seconds, files=1, ids=f"t{self.count}")

    def evidence(self) -> list[EvidenceSpec]:
        return [e.spec for e in read_evidence(self.folder / "evidence") if not isinstance(e, Exception)]


@pytest.fixture
def state(tmp_path: Path, stable_bundle: Bundle, candidate_bundle: Bundle, population: Matrix) -> State:
    state = State(tmp_path, {"risk-a": stable_bundle, "risk-b": candidate_bundle}, population)
    state.services()
    state.route("risk-a", "risk-b")
    return state


@pytest.fixture
def loop(state: State) -> DriftLoop:
    return DriftLoop(StateFolder(state.folder), state.folder / "evidence", SETTINGS)


def test_a_window_closes_when_both_arms_have_rows_and_the_next_begins_there(state: State, loop: DriftLoop) -> None:
    assert loop.tick(at(0)) == []
    state.traffic("risk-b", "candidate", 600, at(1), 15)
    assert loop.tick(at(12)) == []  # the stable arm has none yet
    state.traffic("risk-a", "stable", 900, at(1), 15)
    first = loop.tick(at(20))
    assert [(e.verdict, e.samples, e.window_start, e.window_end) for e in first] == [("Pass", 600, at(0), at(18))]
    state.traffic("risk-b", "candidate", 600, at(19), 5)
    state.traffic("risk-a", "stable", 600, at(19), 5)
    second = loop.tick(at(30))
    assert [(e.verdict, e.samples, e.window_start, e.window_end) for e in second] == [("Pass", 600, at(18), at(28))]
    assert state.evidence() == [*first, *second]


def test_a_window_without_enough_rows_is_no_data_at_its_longest(state: State, loop: DriftLoop) -> None:
    loop.tick(at(0))
    state.traffic("risk-b", "candidate", 100, at(1), 8)
    assert loop.tick(at(50)) == []
    assert [(e.verdict, e.samples) for e in loop.tick(at(62))] == [("NoData", 100)]


def test_a_window_closes_behind_a_gateway_that_marks_every_row_stable(state: State, loop: DriftLoop) -> None:
    loop.tick(at(0))
    state.traffic("risk-b", "stable", 600, at(1), 8)
    state.traffic("risk-a", "stable", 900, at(1), 8)
    assert [(e.verdict, e.samples) for e in loop.tick(at(12))] == [("Pass", 600)]


def test_at_weight_100_a_window_does_not_wait_for_the_stable_model(state: State, loop: DriftLoop) -> None:
    state.route("risk-a", "risk-b", weight=100)
    loop.tick(at(0))
    state.traffic("risk-b", "candidate", 600, at(1), 8)
    assert [(e.verdict, e.samples) for e in loop.tick(at(12))] == [("Pass", 600)]


def test_a_changed_weight_drops_the_open_window(state: State, loop: DriftLoop) -> None:
    loop.tick(at(0))
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(1), 8)
    state.route("risk-a", "risk-b", weight=25)
    assert loop.tick(at(12)) == []
    assert loop.tick(at(20)) == []  # the rows before the change count for neither window
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(20), 8)
    [evidence] = loop.tick(at(31))
    assert (evidence.window_start, evidence.samples) == (at(17), 600)


def test_a_route_without_a_candidate_watches_the_stable_model_alone(state: State, loop: DriftLoop) -> None:
    state.route("risk-a", None)
    loop.tick(at(0))
    state.traffic("risk-a", "stable", 600, at(1), 8)
    [evidence] = loop.tick(at(12))
    assert (evidence.model_digest, evidence.verdict) == (state.bundles["risk-a"].manifest.digest, "Pass")


def test_a_garbage_log_is_error_evidence_and_the_loop_goes_on(state: State, loop: DriftLoop) -> None:
    loop.tick(at(0))
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(1), 8)
    torn = next((state.folder / "inference-log" / "risk-b").glob("date=*/*/part-*.parquet")).with_name("part-torn.parquet")
    torn.write_bytes(b"PAR1")
    assert [e.verdict for e in loop.tick(at(12))] == ["Error"]
    torn.unlink()
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(13), 5)
    assert [(e.verdict, e.window_start) for e in loop.tick(at(22))] == [("Pass", at(10))]


@pytest.mark.parametrize(("service", "name"), [(1, "risk-b"), (0, "risk-a")], ids=["candidate", "stable"])
def test_a_bundle_that_is_not_the_service_s_digest_is_error_evidence(state: State, loop: DriftLoop, service: int, name: str) -> None:
    digest = "sha256:" + "cd" * 32
    services = json.loads((state.folder / "services.json").read_text())
    services["services"][service]["modelDigest"] = digest
    state.write("services.json", json.dumps(services))
    loop.tick(at(0))
    state.traffic("risk-b", "candidate", 600, at(1), 8)
    [evidence] = loop.tick(at(62))
    assert (evidence.verdict, evidence.model_digest) == ("Error", digest if name == "risk-b" else state.bundles["risk-b"].manifest.digest)
    assert digest in evidence.message


@pytest.mark.parametrize(("name", "text"), [
    ("services.json", "[" * 100_000), ("routes/risk.json", '{"a":' * 100_000),
    ("services.json", "{"), ("services.json", "[]"), ("services.json", '{"services": 3}'), ("routes/risk.json", '"x"'),
    ("objects/InferenceService-risk-b.yaml", "spec: {predictor: {model: {storageUri: 's3://b/m'}}}"),
    ("objects/InferenceService-risk-b.yaml", "a: [1"),
])
def test_a_state_that_cannot_be_understood_names_the_file_and_writes_nothing(
    state: State, loop: DriftLoop, name: str, text: str,
) -> None:
    state.write(name, text)
    with pytest.raises(StateError, match=Path(name).name.replace(".", r"\.")):
        StateFolder(state.folder).targets()
    assert loop.tick(at(0)) == []


@pytest.mark.parametrize(("arguments", "lag"), [
    (["--log_flush_seconds=30"], 31.0), (["--model_name=m", "--log_flush_seconds", "1.5"], 2.5), ([], 11.0), (None, 0.0),
    (["--log_flush_seconds=1e1"], 11.0), (["--log_flush_seconds=30", "--log_flush_seconds=2"], 3.0),
    (["exec transformer --log_flush_seconds  '4' --x"], 5.0),
])
def test_a_window_ends_before_the_rows_that_are_still_in_the_transformers_memory(
    state: State, arguments: list[str] | None, lag: float,
) -> None:
    spec: dict[str, Any] = {"predictor": {"model": {"storageUri": state.bundles["risk-b"].path.resolve().as_uri()}}}
    if arguments is not None:
        spec["transformer"] = {"containers": [{"name": "kserve-container", "args": arguments}]}
    state.write("objects/InferenceService-risk-b.yaml", yaml.safe_dump({"spec": spec}))
    [target] = StateFolder(state.folder).targets()
    assert target.log_lag_s == lag


def test_the_transformers_environment_says_how_late_its_rows_are_as_well(state: State) -> None:
    spec: dict[str, Any] = {"predictor": {"model": {"storageUri": state.bundles["risk-b"].path.resolve().as_uri()}}}
    container = {"args": [], "env": [{"name": "HAFNIUM_LOG_FLUSH_SECONDS", "value": "20"}]}
    state.write("objects/InferenceService-risk-b.yaml", yaml.safe_dump({"spec": spec | {"transformer": {"containers": [container]}}}))
    assert StateFolder(state.folder).targets()[0].log_lag_s == 21.0


@pytest.mark.parametrize("given", [".", "nan", "0", "-1", "soon", "$(FLUSH)"])
def test_a_flush_time_that_is_none_names_the_file_and_blinds_no_route(
    state: State, loop: DriftLoop, given: str, caplog: pytest.LogCaptureFixture,
) -> None:
    container = {"args": [f"--log_flush_seconds={given}"]}
    uri = state.bundles["risk-b"].path.resolve().as_uri()
    spec = {"predictor": {"model": {"storageUri": uri}}, "transformer": {"containers": [container]}}
    state.write("objects/InferenceService-risk-b.yaml", yaml.safe_dump({"spec": spec}))
    state.route("risk-a", None)
    state.write("routes/other.json", json.dumps({"name": "other", "stable": "risk-b", "candidate": None}))
    lags = {t.name: t.log_lag_s for t in StateFolder(state.folder).targets()}
    assert lags == {"risk": 0.0, "other": FLUSH_LAG_S_DEFAULT}
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(said) == 1
    assert "InferenceService-risk-b.yaml: --log_flush_seconds: expected seconds above 0" in said[0]
    loop.tick(at(0))
    state.traffic("risk-a", "stable", 600, at(1), 8)
    assert [e.verdict for e in loop.tick(at(12))] == ["Pass"], "the other route's window is judged"


def test_a_finding_that_cannot_be_written_is_kept_and_written_later(
    state: State, loop: DriftLoop, caplog: pytest.LogCaptureFixture,
) -> None:
    folder = state.folder / "evidence"
    folder.write_text("a file where the folder should be")
    loop.tick(at(0))
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(1), 8)
    assert loop.tick(at(12)) == []
    assert any("Pass" in r.getMessage() and "tried again" in r.getMessage() for r in caplog.records), "the verdict is in the log"
    folder.unlink()
    assert [(e.verdict, e.window_end) for e in loop.tick(at(14))] == [("Pass", at(10))]
    assert [e.window_end for e in state.evidence()] == [at(10)]
    assert loop.tick(at(15)) == []


@pytest.mark.slow
def test_no_report_stays_of_a_finding_that_is_not_written_and_none_is_linked_when_it_is_later(state: State) -> None:
    folder, reports = state.folder / "evidence", state.folder / "reports"
    settings = replace(SETTINGS, report=ReportSettings(folder=reports, when="always"))
    loop = DriftLoop(StateFolder(state.folder), folder, settings)
    folder.write_text("a file where the folder should be")
    loop.tick(at(0))
    for service, arm in (("risk-b", "candidate"), ("risk-a", "stable")):
        state.traffic(service, arm, 600, at(1), 8)
    assert loop.tick(at(12)) == []
    assert list(reports.iterdir()) == []
    folder.unlink()
    assert [e.report for e in loop.tick(at(14))] == [""]
    again = DriftLoop(StateFolder(state.folder), folder, settings)  # a loop begun anew, at the same time: its window is judged already
    again.tick(at(0))
    assert again.tick(at(12)) == []
    assert list(reports.iterdir()) == []


def test_a_loop_without_a_state_folder_waits_for_a_transformer_that_flushes_as_it_does_by_default(
    tmp_path: Path, candidate_bundle: Bundle, population: Matrix,
) -> None:
    digest, logs = candidate_bundle.manifest.digest, (tmp_path / "log",)
    source = FixedTargets((Target("model", candidate_bundle.path, digest, logs, None, None, "fixed", log_lag_s=FLUSH_LAG_S_DEFAULT),))
    loop = DriftLoop(source, tmp_path / "evidence", replace(SETTINGS, report=ReportSettings(when="never")))
    judged = 0
    for second in range(1, 121):
        if second % 10 == 3:  # 100 rows/s, and the writer's phase is its own
            write_log(tmp_path / "log", candidate_bundle, population[second * 100 : second * 100 + 1_000], "stable",
                      start=at(second - 10), seconds=10, files=1, ids=str(second))
        if second % 10 == 0:
            judged += sum(e.samples for e in loop.tick(at(second)))
    assert judged == 9_900, "all rows from the first look at 10 s to 109 s"


def test_a_route_to_a_service_that_is_not_there_yet_is_left_out(state: State) -> None:
    state.route("risk-a", "risk-z")
    assert StateFolder(state.folder).targets() == ()
    (state.folder / "services.json").unlink()
    assert StateFolder(state.folder).targets() == ()


@pytest.fixture
def process(state: State) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hafnium_monitoring", "drift", "--state", str(state.folder), "--every", "500ms",
               "--window", "30s", "--min-rows", "500", "--looks", "10", "--log-lag", "200ms", "--no-report"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                running.kill()


@pytest.mark.slow
def test_the_loop_as_a_process_writes_evidence_refuses_a_second_one_and_ends_by_sigterm(
    state: State, process: subprocess.Popen[str],
) -> None:
    deadline = time.monotonic() + 60
    lock = state.folder / "evidence" / ".drift.lock"
    while not lock.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not state.evidence():
        assert process.poll() is None
        assert time.monotonic() < deadline
        now = datetime.now(UTC)
        for service, arm in (("risk-b", "shadow"), ("risk-a", "stable")):
            state.traffic(service, arm, 600, now, 0.01)
        time.sleep(1)
    assert state.evidence()[0].verdict == "Pass"
    second = subprocess.run(
        [sys.executable, "-m", "hafnium_monitoring", "drift", "--state", str(state.folder), "--every", "1s"],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert second.returncode == 2
    assert "another drift run" in second.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not [p for p in (state.folder / "evidence").iterdir() if p.name.startswith(".drift-")]
