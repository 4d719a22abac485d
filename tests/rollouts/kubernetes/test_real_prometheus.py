"""Looks from the real Prometheus, as Debian packages it: what it says of pods that one job scrapes, two jobs, or nobody any more; and
rollouts that are decided on them together with scores across the arms, from a log of files."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hafnium_rollout_world import CANDIDATE, STABLE, rollout
from hafnium_servers import free_port

from hafnium_contract.inference_log import FIXED, partition
from hafnium_rollout.actions import Promote, Rollback, SetWeight
from hafnium_rollout.decide import decide
from hafnium_rollout.kubernetes.objects_seen import PodSeen, meta_of
from hafnium_rollout.kubernetes.observer import Observer, Traffic
from hafnium_rollout.kubernetes.prometheus_client import Prometheus
from hafnium_rollout.kubernetes.prometheus_queries import LookMade, PrometheusLooks
from hafnium_rollout.kubernetes.score_log import ScoreLog
from hafnium_rollout.kubernetes.served_models import ServedModels
from hafnium_rollout.kubernetes.snapshot import Snapshot
from hafnium_rollout.observation import LiveRoute, Look, RouteSeen, ServiceSeen
from hafnium_rollout.status import ModelSeen, RolloutStatus, stored

SCRAPE_S = 0.3
WAIT_S = 60.0
"""A limit and no measurement: the machine may be busy."""


class Model:
    """A pod's /metrics, with counters that the test moves."""

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.scrapes = 0
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                model.scrapes += 1
                labels = 'component="predictor",model_name="m",model_version="1"'
                text = (f"# TYPE inference_requests_total counter\ninference_requests_total{{{labels}}} {model.requests}\n"
                        f"# TYPE inference_errors_total counter\n"
                        f'inference_errors_total{{{labels},type="internal"}} {model.errors}\n').encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._open = True

    def close(self) -> None:
        if self._open:
            self._open = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


def until(check: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT_S
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {WAIT_S:g} s"
        time.sleep(0.05)


@contextmanager
def prometheus(folder: Path, jobs: Sequence[dict[str, Any]]) -> Generator[str]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("NOT TESTED against a real Prometheus: not installed (Debian: apt-get install prometheus)")
    folder.mkdir()
    config = folder / "prometheus.yml"
    times = {"scrape_interval": f"{round(SCRAPE_S * 1000)}ms", "scrape_timeout": f"{round(SCRAPE_S * 1000)}ms"}
    config.write_text(yaml.safe_dump({"global": times, "scrape_configs": list(jobs)}))
    port = free_port()
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
               "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=2).close()  # noqa: S310 - a port of the test's own
        except OSError:
            return False
        return True

    try:
        until(ready, "Prometheus is ready")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def job(name: str, pods: dict[str, Model], *, instance: str = "") -> dict[str, Any]:
    """A scrape job. `instance`: written over the address, as some relabelings do."""
    targets = [{"targets": [m.address], "labels": {"namespace": "ns", "pod": pod}} for pod, m in pods.items()]
    return {"job_name": name, "static_configs": targets,
            **({"relabel_configs": [{"target_label": "instance", "replacement": instance}]} if instance else {})}


class Looking:
    """The operator's looks at stable (s-1) and one candidate pod."""

    def __init__(self, url: str, models: dict[str, Model], pod: str) -> None:
        self._looks = PrometheusLooks(Prometheus(url), scrape_interval_s=SCRAPE_S, clock_skew_s_max=5.0)
        self._models, self._pod = models, pod
        self.status = RolloutStatus(stable=ModelSeen(service="s"), candidate=ModelSeen(service="c"), run_id="r")

    def once(self) -> LookMade:
        pods = {s: (PodSeen(p, s, "predictor", True, 0),) for s, p in (("s", "s-1"), ("c", self._pod))}
        made = self._looks.look(rollout(), "ns", self.status, pods, datetime.now(UTC))
        self.status = self.status.model_copy(update={"cursor": made.cursor})
        return made

    def scraped(self) -> None:
        """Both pods were scraped twice since now, so what happened before is in Prometheus."""
        before = {p: self._models[p].scrapes for p in ("s-1", self._pod)}
        until(lambda: all(self._models[p].scrapes >= n + 3 for p, n in before.items()), "scrapes")

    def after(self, stable: int, candidate: int, errors: int) -> Look:
        """The look over so many requests."""
        self.scraped()
        self.once()
        self._models["s-1"].requests += stable
        self._models[self._pod].requests += candidate
        self._models[self._pod].errors += errors
        self.scraped()
        return until(lambda: self.once().look, "a look")


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Model]]:
    with ExitStack() as stack:
        found: dict[str, Model] = {}
        for pod in ("s-1", "c-1", "twice-1", "renamed-1", "gone-1"):
            found[pod] = Model()
            stack.callback(found[pod].close)
        yield found


@pytest.fixture(scope="module")
def url(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    jobs = [
        job("pods", {p: m for p, m in models.items() if p != "renamed-1"}), job("monitor", {"twice-1": models["twice-1"]}),
        job("annotated", {"renamed-1": models["renamed-1"]}), job("by-name", {"renamed-1": models["renamed-1"]}, instance="renamed-1"),
    ]
    with prometheus(tmp_path_factory.mktemp("prometheus") / "it", jobs) as found:
        yield found


@pytest.mark.parametrize("pod", ["c-1", "twice-1"], ids=["one job", "two jobs over one address"])
def test_requests_of_a_pod_count_once_however_many_jobs_scrape_it(url: str, models: dict[str, Model], pod: str) -> None:
    looking = Looking(url, models, pod)
    look = looking.after(900, 100, 7)
    series = look.gates["errors"].series[0]
    assert (series.stable.total, series.candidate.total, series.candidate.bad) == (900, 100, 7)
    assert look.candidate_requests == 100
    looking.scraped()
    assert until(lambda: looking.once().look, "a look").candidate_requests == 0


def test_two_jobs_under_different_instances_are_an_error_that_says_what_to_do(url: str, models: dict[str, Model]) -> None:
    looking = Looking(url, models, "renamed-1")
    look = looking.after(900, 100, 7)
    gate = look.gates["errors"]
    assert gate.series == ()
    assert "pod renamed-1 is scraped as 2 targets that differ in instance, job" in gate.error
    assert "let one scrape job have it" in gate.error
    assert look.candidate_requests is None


def test_a_pod_that_stops_being_scraped_has_no_count_and_never_zero(url: str, models: dict[str, Model]) -> None:
    looking = Looking(url, models, "gone-1")
    assert looking.after(50, 20, 0).candidate_requests == 20
    models["gone-1"].close()
    until(lambda: not Prometheus(url).query('inference_requests_total{pod="gone-1"}').samples, "Prometheus knows that it is gone")
    for _ in range(3):
        before = models["s-1"].scrapes
        until(lambda b=before: models["s-1"].scrapes >= b + 3, "scrapes")
        made = looking.once()
        if made.look is not None:
            assert made.look.candidate_requests is None
            assert "has no inference_requests_total of c" in made.look.gates["errors"].error


# --- scores across the arms, with counters and a log ------------------------------------------------------------------------------

STABLE_SERVICE, SERVICE = "risk-bbbbbbbb", "risk-aaaaaaaa"
UNPAIRED = rollout(
    routing={"backend": "PairedServices"},
    strategy={"steps": [{"weight": 20, "minDwell": "2s", "minSamples": 400, "deadline": "20m"}, {"weight": 100, "minDwell": "1s"}],
              "scrapeLag": "600ms", "maxBlindDuration": "5m"},
    gates=[{"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.2}},
           {"name": "scores", "role": "Quality", "scores": {"unpaired": True}, "compare": {"margin": 0.1}}])


class Arms:
    """A live rollout at the operator's own eyes: counters in Prometheus, answers in the log, the route as it is decided. Time is real."""

    def __init__(self, url: str, models: dict[str, Model], log: Path, shift: float) -> None:
        self._models, self._log, self._shift = models, log, shift
        self._random = np.random.default_rng(7)
        self._files = 0
        client = Prometheus(url)
        looks = PrometheusLooks(client, scrape_interval_s=SCRAPE_S, clock_skew_s_max=5.0)
        self._observer = Observer(looks, ScoreLog(f"{log}/{{service}}"), ServedModels(None, SCRAPE_S))
        self.route = RouteSeen(STABLE_SERVICE, None, 0, False)
        stable = ModelSeen(service=STABLE_SERVICE, digest=STABLE)
        self.status = RolloutStatus(stable=stable)
        self.lost = 0

    def answer(self) -> None:
        """A second's requests at the weights of the route: counted by the pods, logged by the transformers."""
        weight = self.route.weight
        for service, pod, digest, count, shift in (
            (STABLE_SERVICE, "s-1", STABLE, 10 * (100 - weight), 0.0), (SERVICE, "c-1", CANDIDATE, 10 * weight, self._shift),
        ):
            if not count:
                continue
            self._models[pod].requests += count
            now = datetime.now(UTC)
            scores = np.clip(self._random.beta(1, 6, count) + shift, 0.0, 1.0)
            arm = "stable" if service == STABLE_SERVICE else "candidate"
            columns: dict[str, list[Any]] = {f.name: [None] * count for f in FIXED} | {
                "request_id": [f"{self._files}-{i}" for i in range(count)], "time": [now] * count, "model_name": ["risk"] * count,
                "model_version": ["1"] * count, "model_digest": [digest] * count, "arm": [arm] * count, "score": scores.tolist()}
            self._files += 1
            path = partition(self._log / service, now, "1") / f"part-{now:%Y%m%dT%H%M%S%f}-{self._files:04d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = path.with_name(f".{path.name}")
            pq.write_table(pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in FIXED], schema=FIXED), staging)
            staging.replace(path)

    def turn(self, *, written: bool) -> None:
        """One turn; without `written` the API server takes the status of it from nobody."""
        now = datetime.now(UTC)
        weights = {STABLE_SERVICE: 100 - self.route.weight} | ({SERVICE: self.route.weight} if self.route.weight else {})
        pods = {s: (PodSeen(p, s, "predictor", True, 0),) for s, p in ((STABLE_SERVICE, "s-1"), (SERVICE, "c-1"))}
        services = {s: ServiceSeen(s, d, True) for s, d in ((STABLE_SERVICE, STABLE), (SERVICE, CANDIDATE))}
        traffic = Traffic(
            services, frozenset(services), frozenset({SERVICE}), self.route, live=LiveRoute(weights), pods=pods, serving=pods)
        meta = meta_of({"metadata": {"namespace": "ns", "name": "risk"}})
        snapshot = Snapshot(pods={("ns", s): p for s, p in pods.items()}, evidence={}, approvals={})
        seen = self._observer.complete(UNPAIRED, meta, self.status, snapshot, now, traffic, look=True)
        decision = decide(UNPAIRED, self.status, seen, now)
        if not written and not decision.actions:
            self.lost += 1
            return
        self.status = RolloutStatus.model_validate(json.loads(json.dumps(stored(decision.status))))
        for action in decision.actions:
            match action:
                case SetWeight():
                    self.route = RouteSeen(action.stable, action.candidate, action.weight, False)
                case Promote():
                    self.route = RouteSeen(action.service, None, 0, False)
                case Rollback():
                    self.route = RouteSeen(action.stable, None, 0, False)
                case _:
                    pass


@pytest.mark.parametrize(("shift", "end"), [(0.0, "Promoted"), (0.3, "RolledBack")], ids=["equal models", "scores that moved"])
def test_a_rollout_without_shadow_is_decided_on_scores_across_the_arms_though_every_third_status_is_lost(
    tmp_path: Path, shift: float, end: str,
) -> None:
    with ExitStack() as stack:
        models = {pod: Model() for pod in ("s-1", "c-1")}
        for model in models.values():
            stack.callback(model.close)
        url = stack.enter_context(prometheus(tmp_path / "prometheus", [job("pods", models)]))
        arms = Arms(url, models, tmp_path / "log", shift)
        until(lambda: len(Prometheus(url).query("inference_requests_total").samples) == 2, "both are scraped")
        logged = counted = 0
        for number in range(200):
            arms.answer()
            before = {pod: m.scrapes for pod, m in models.items()}
            until(lambda b=before: all(models[p].scrapes >= n + 2 for p, n in b.items()), "scrapes")
            arms.turn(written=number % 3 != 2)
            gate = next((g for g in arms.status.gates if g.name == "scores"), None)
            if gate is not None and arms.status.step is not None and arms.status.step.index == 0:
                counted = max(counted, gate.samples)
                logged = models["c-1"].requests
            if arms.status.phase in ("Promoted", "RolledBack"):
                break
    assert arms.status.phase == end, arms.status.message
    assert arms.lost > 0
    assert 0 < counted <= logged, "no score counts twice"
    if end == "RolledBack":
        assert "differences across arms: more than" in arms.status.message
        assert arms.status.rejected_digests == (CANDIDATE,)
