"""A CronJob's run over all rollouts: real bundles, logs and evidence, and an API server on loopback that lists the rollouts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from hafnium_contract.bundle import Bundle
from hafnium_contract.evidence import EvidenceSpec, read_evidence
from hafnium_monitoring import cluster_job
from hafnium_monitoring.__main__ import _told  # pyright: ignore[reportPrivateUsage]
from hafnium_monitoring.bundle_places import bundle_places
from hafnium_monitoring.cluster_job import ClusterRun, Counted
from hafnium_monitoring.evidence_places import ClusterEvidence, FolderEvidence
from hafnium_monitoring.settings import DriftRules, ReportSettings

from .conftest import NOW, START, World, change, write_log
from .test_api_server import Scripted, serving

HOUR = timedelta(hours=1)
UNREACHABLE = "s3://models/{}?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
DRIFTED = change("transaction_amount", lambda v: v * 100)


def model(bundle: Bundle, uri: str, service: str = "x") -> dict[str, str]:
    return {"service": service, "digest": bundle.manifest.digest, "storageUri": uri}


def promoted(name: str, bundle: Bundle, uri: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"phase": "Promoted", "stable": model(bundle, uri)}}


def climbing(name: str, stable: dict[str, str], candidate: dict[str, str], since: str = "2026-01-15T11:50:00Z") -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {
        "phase": "Progressing", "stable": stable, "candidate": candidate, "step": {"index": 0, "weightEffectiveSince": since}}}


class Cluster:
    """One namespace: bundles on a volume, one log per rollout, evidence in a folder."""

    def __init__(self, world: World) -> None:
        self.root = world.root
        self.logs = world.root / "logs"
        self.evidence = world.root / "evidence"
        for name, bundle in (("stable", world.stable), ("candidate", world.candidate)):
            shutil.copytree(bundle.path, self.root / "volumes" / "bundles" / name)
        self.logs.mkdir()

    @contextmanager
    def run(self, items: Sequence[dict[str, Any]]) -> Generator[ClusterRun]:
        (self.root / "account").mkdir(exist_ok=True)
        script = Scripted([(200, {"items": list(items)}, {})])
        with serving(self.root / "account", script) as server, bundle_places(self.root / "volumes") as places:
            yield ClusterRun(server, FolderEvidence(self.evidence), places, (f"{self.logs}/{{rollout}}",), HOUR, timedelta(seconds=30))

    def look(self, *items: dict[str, Any]) -> Counted:
        with self.run(items) as run:
            return cluster_job.drift(run, NOW + timedelta(minutes=2), DriftRules(looks=10), None)

    def written(self) -> list[EvidenceSpec]:
        return [e.spec for e in read_evidence(self.evidence) if not isinstance(e, Exception)]


@pytest.fixture
def cluster(world: World) -> Cluster:
    return Cluster(world)


def test_bundles_that_cannot_be_fetched_are_errors_and_cost_the_others_nothing(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    write_log(cluster.logs / "c", world.candidate, world.matrix(2_000), "stable")
    a, b = promoted("a", world.stable, UNREACHABLE.format("a")), promoted("b", world.stable, UNREACHABLE.format("b"))
    b["status"]["stable"]["digest"] = "sha256:" + "cd" * 32
    counted = cluster.look(a, b, promoted("c", world.candidate, "pvc://bundles/candidate"))
    assert [e.verdict for e in counted.findings] == ["Error", "Error", "Pass"]
    assert "can't be fetched" in counted.findings[1].message
    assert counted.problems == 0


def digest_of_another_form(item: dict[str, Any]) -> None:
    item["status"]["stable"]["digest"] = "sha256:zz"


def status_of_another_form(item: dict[str, Any]) -> None:
    item["status"]["stable"] = [1]


def since_of_another_form(item: dict[str, Any]) -> None:
    item["status"]["step"] = {"weightEffectiveSince": "soon"}


@pytest.mark.parametrize("spoil", [digest_of_another_form, status_of_another_form, since_of_another_form])
def test_a_status_of_another_form_is_a_problem_that_names_the_rollout_and_the_others_are_looked_at(
    spoil: Callable[[dict[str, Any]], None], world: World, cluster: Cluster, caplog: pytest.LogCaptureFixture,
) -> None:
    write_log(cluster.logs / "b", world.candidate, world.matrix(2_000), "stable")
    bad = promoted("spoilt", world.stable, "pvc://bundles/stable")
    spoil(bad)
    counted = cluster.look(bad, promoted("b", world.candidate, "pvc://bundles/candidate"))
    assert ([e.verdict for e in counted.findings], counted.problems) == (["Pass"], 1)
    assert any("spoilt" in r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)


def test_a_place_that_cannot_be_taken_apart_is_error_evidence(world: World, cluster: Cluster) -> None:
    counted = cluster.look(promoted("a", world.stable, "pvc://[x/y"), promoted("b", world.candidate, "pvc://bundles/candidate"))
    assert [e.verdict for e in counted.findings] == ["Error", "NoData"]


def test_evidence_that_cannot_be_written_is_a_problem_for_each_rollout(
    world: World, cluster: Cluster, caplog: pytest.LogCaptureFixture,
) -> None:
    cluster.evidence.write_text("a file where the folder should be")
    counted = cluster.look(promoted("a", world.stable, "pvc://bundles/stable"), promoted("b", world.candidate, "pvc://bundles/candidate"))
    assert (counted.findings, counted.problems) == ((), 2)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert [text.partition(":")[0] for text in errors] == ["a", "b"]
    assert all("can't be written" in text and "NoData" in text for text in errors), "the finding is not lost"


def test_a_finding_that_the_api_server_does_not_take_is_in_the_log(
    world: World, cluster: Cluster, caplog: pytest.LogCaptureFixture,
) -> None:
    write_log(cluster.logs / "a", world.candidate, world.matrix(2_000, DRIFTED), "stable")
    (cluster.root / "api").mkdir()
    with cluster.run([promoted("a", world.candidate, "pvc://bundles/candidate")]) as run, serving(
        cluster.root / "api", Scripted([(422, {"message": "refused"}, {})])) as other:
        counted = cluster_job.drift(
            replace(run, evidence=ClusterEvidence(other)), NOW + timedelta(minutes=2), DriftRules(looks=10), None)
    assert (counted.findings, counted.problems) == ((), 1)
    assert any("a: not written: Fail: " in r.getMessage() and "transaction_amount" in r.getMessage() for r in caplog.records)


def test_a_stable_model_whose_place_holds_another_bundle_is_error_evidence(world: World, cluster: Cluster) -> None:
    start = START + timedelta(minutes=1)
    write_log(cluster.logs / "a", world.candidate, world.matrix(2_000), "candidate", start=start, seconds=3_000)
    write_log(cluster.logs / "a", world.stable, world.matrix(2_000), "stable", start=start, seconds=3_000)
    candidate = model(world.candidate, "pvc://bundles/candidate")
    counted = cluster.look(climbing("a", model(world.stable, "pvc://bundles/candidate"), candidate))
    assert [e.verdict for e in counted.findings] == ["Error"]
    assert world.stable.manifest.digest in counted.findings[0].message


def test_rollouts_of_the_same_model_are_judged_together(world: World, cluster: Cluster) -> None:
    write_log(cluster.logs / "b", world.candidate, world.matrix(2_000, DRIFTED), "stable")
    place = "pvc://bundles/candidate"
    counted = cluster.look(promoted("a", world.candidate, place), promoted("b", world.candidate, place))
    assert [(e.verdict, e.samples) for e in counted.findings] == [("Fail", 2_000)]
    assert (counted.there_already, counted.problems) == (0, 0)
    again = cluster.look(promoted("a", world.candidate, place), promoted("b", world.candidate, place))
    assert (again.findings, again.there_already, again.problems) == ((), 2, 0)


def test_a_repeated_run_finds_its_window_written_and_warns_of_nothing(
    world: World, cluster: Cluster, caplog: pytest.LogCaptureFixture,
) -> None:
    write_log(cluster.logs / "a", world.candidate, world.matrix(2_000), "stable")
    items = promoted("a", world.candidate, "pvc://bundles/candidate")
    assert len(cluster.look(items).findings) == 1
    caplog.clear()
    again = cluster.look(items)
    assert (again.findings, again.there_already, again.problems) == ((), 1, 0)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.slow
def test_the_report_of_a_repeated_window_pushes_out_none_that_evidence_links_to(world: World, cluster: Cluster) -> None:
    write_log(cluster.logs / "a", world.candidate, world.matrix(2_000), "stable")
    reports = ReportSettings(folder=cluster.root / "reports", keep=1)
    for minutes in (2, 12):
        with cluster.run([promoted("a", world.candidate, "pvc://bundles/candidate")]) as run:
            counted = cluster_job.drift(run, NOW + timedelta(minutes=minutes), DriftRules(looks=10), reports)
    assert counted.there_already == 1
    [spec] = cluster.written()
    assert {str(p) for p in (cluster.root / "reports").glob("*.html")} == {spec.report}


def test_rows_of_rollouts_that_are_judged_together_begin_after_the_later_of_their_steps(world: World, cluster: Cluster) -> None:
    stable, candidate = model(world.stable, "pvc://bundles/stable"), model(world.candidate, "pvc://bundles/candidate")
    late = (START + timedelta(minutes=18)).isoformat()
    counted = cluster.look(climbing("a", stable, candidate), climbing("b", stable, candidate, late))
    assert [(e.verdict, e.window_start, e.window_end) for e in counted.findings] == [("NoData", START + timedelta(minutes=20), NOW)]


def test_a_model_against_another_one_in_each_rollout_is_said_and_ends_no_job_as_failed(
    world: World, cluster: Cluster, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:
    write_log(cluster.logs / "b", world.candidate, world.matrix(2_000), "candidate")
    write_log(cluster.logs / "b", world.stable, world.matrix(2_000), "stable")
    candidate = model(world.candidate, "pvc://bundles/candidate")
    counted = cluster.look(
        promoted("a", world.candidate, "pvc://bundles/candidate"), climbing("b", model(world.stable, "pvc://bundles/stable"), candidate),
    )
    assert [(e.verdict, e.samples) for e in counted.findings] == [("Pass", 2_000)], "the climb waits for its finding"
    assert (counted.judged_elsewhere, counted.problems) == (1, 0)
    assert any("a: model" in r.getMessage() and "judged for b" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert _told(counted) == 0, "the Job would be run again, and would find the same"
    assert "judged for another rollout: 1;" in capsys.readouterr().out
