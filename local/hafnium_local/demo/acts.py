"""The demo, act by act. Each act leaves its result on disk, so a demo that was killed goes on after the last act that was done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hafnium_contract.bundle import Bundle, open_bundle
from hafnium_contract.contract_file import load_contract
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.whole_files import write_atomically
from hafnium_local.demo.children import STEP_NICENESS, Servant, StepFailedError, Surroundings, hafnium, run_step
from hafnium_local.demo.plan import (
    PACE,
    PACE_FILE,
    SHARE_V1_FILE,
    SHARE_V2_FILE,
    STALE_BY,
    Cutoffs,
    DemoOptions,
    Folders,
    age_max,
    cutoffs,
    fault_of,
)
from hafnium_local.demo.traces import Ended, ended, read_json, read_status
from hafnium_local.manifest_writer import Serving, inference_service, model_rollout, to_yaml
from hafnium_local.processes import python_module
from hafnium_rollout import commands

READY_S = 120.0
"""For the services to answer after `up`."""
TRAINING_S = 600.0
"""A training takes half a minute on two quiet cores; it gives way to everything else."""
ROLLOUT_S = 420.0
"""A rollout at the demo's pace takes one to two minutes; one that takes longer has gone wrong."""
REQUESTS_MAX = 100_000
"""Replayed again, under other ids, when the demo takes longer."""
DRIFT_LOOKS = 20
"""Windows that one rollout of the demo looks at, at most."""
DRIFT_ROWS = 150
"""The production default is 1,000; at 5 % of the demo's traffic that would take minutes. A small drift is then missed, a fault is not."""


class Story:
    """One line per event: to the terminal, and to story.jsonl, which a second run reads on."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self._path = path
        self._tell = tell

    def add(self, text: str) -> None:
        """Tells and keeps one event; paths in it are told as seen from the work folder."""
        text = text.replace(f"{self._path.parent}/", "")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"time": datetime.now(UTC).isoformat(), "event": text}) + "\n")
        self._tell(text)


@dataclass(frozen=True)
class Stage:
    """What all acts share."""

    options: DemoOptions
    folders: Folders
    contract: ModelContract
    story: Story
    around: Surroundings
    resumed: bool = False
    """An earlier process of this demo was interrupted, perhaps long ago."""

    @property
    def data(self) -> Path:
        return self.options.data or self.folders.simulated

    def once(self, act: str, do: Callable[[], Any]) -> None:
        """Does an act unless it was done before. The mark is made after it: an act that was cut off is done again."""
        mark = self.folders.work / "done" / act
        if self.done(act):
            return
        do()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def done(self, act: str) -> bool:
        """Whether the act was done, now or by an earlier process of this demo."""
        return (self.folders.work / "done" / act).exists()

    def step(self, name: str, *args: str, meanwhile: Callable[[], None] = lambda: None, lines: int = 1) -> None:
        """A `hafnium` command, run to its end; its last lines of output are told."""
        said = run_step(name, hafnium(*args), self.around, meanwhile)
        for line in [x for x in said.splitlines() if x.strip()][-lines:]:
            self.story.add(line)


def stage_of(options: DemoOptions, tell: Callable[[str], None], *, resumed: bool = False) -> Stage:
    """Opens the work folder and the contract."""
    folders = Folders(options.work)
    story = Story(folders.story, tell)
    return Stage(options, folders, load_contract(options.contract), story, Surroundings(folders.logs, story.add), resumed)


# --- data, features, first model ----------------------------------------------------------------------------------------------


def gather(stage: Stage) -> Cutoffs:
    """Act 1: the data, and the moments at which it is cut."""
    o, f = stage.options, stage.folders
    if o.data is None:
        stage.once("simulate", lambda: stage.step(
            "simulate", "simulate", "--out", str(f.simulated), "--days", str(o.days), "--seed", str(o.seed)
        ))
    plan = f.work / "cutoffs.json"
    if not plan.exists():
        found = _cutoffs(stage)
        write_atomically(plan, json.dumps({k: v.isoformat() for k, v in vars(found).items()}))
        stage.story.add(f"v1 knows what was known until {found.v1:%Y-%m-%d %H:%M}, v2 until {found.v2:%Y-%m-%d %H:%M}")
    return Cutoffs(**{k: datetime.fromisoformat(v) for k, v in read_json(plan).items()})


def _cutoffs(stage: Stage) -> Cutoffs:
    if stage.options.data is None:
        summary = read_json(stage.folders.simulated / "summary.json")
        first, last = datetime.fromisoformat(summary["start"]), datetime.fromisoformat(summary["end"])
        return cutoffs(first, last, {}, simulated=True, age_max=age_max(stage.contract))
    from hafnium_training.tables import event_times, read_table

    times = event_times(stage.contract, read_table(stage.options.data, stage.contract), str(stage.options.data)).sort_values()
    at = {share: times.iloc[int(share * len(times))].to_pydatetime() for share in (SHARE_V1_FILE, SHARE_V2_FILE)}
    first, last = times.iloc[0].to_pydatetime(), times.iloc[-1].to_pydatetime()
    return cutoffs(first, last, at, simulated=False, age_max=age_max(stage.contract))


def features(stage: Stage, cut: Cutoffs) -> None:
    """Act 2: Feast from the contract, the training table, the online store as of the day on which the replay begins."""
    f, contract = stage.folders, str(stage.options.contract)
    stage.once("features", lambda: stage.step(
        "features", "features", "build", "--contract", contract, "--data", str(stage.data), "--repo", str(f.features),
        "--out", str(f.training_table), "--until", cut.replay_from.isoformat(), lines=2,
    ))
    if stage.options.fault == "stale" and stage.contract.views:
        stage.once("stale-copy", lambda: stage.step(
            "stale-copy", "features", "copy", "--repo", str(f.features), "--out", str(f.stale_features)
        ))
        stage.once("stale-store", lambda: stage.step(
            "stale-store", "features", "materialise", "--contract", contract, "--repo", str(f.stale_features),
            "--until", (cut.replay_from - STALE_BY).isoformat(),
        ))


def train(stage: Stage, cut: Cutoffs) -> Bundle:
    """Act 3: v1, with a search."""
    stage.once("train-v1", lambda: stage.step("train-v1", *_training(stage, "v1", cut)))
    return open_bundle(stage.folders.bundle("v1"))


def _training(stage: Stage, version: str, cut: Cutoffs) -> list[str]:
    """Arguments of `hafnium train`: v2 and v3 know more data than v1 and take the hyperparameters that its search found."""
    o, f = stage.options, stage.folders
    until, seed, extra = {
        "v1": (cut.v1, o.seed, ["--trials", str(o.trials)]),
        "v2": (cut.v2, o.seed, ["--params", str(f.bundle("v1")), "--production", str(f.bundle("v1"))]),
        "v3": (cut.v2, o.seed + 1, ["--params", str(f.bundle("v1")), "--production", str(f.bundle("v1"))]),
    }[version]
    return [
        "train", "--contract", str(o.contract), "--data", str(f.training_table), "--out", str(f.bundle(version)),
        "--model-version", version, "--seed", str(seed), "--until", until.isoformat(), "--tracking", str(f.tracking), *extra,
    ]


class Retraining:
    """Beginning of acts 5 and 6: v2 and v3 are trained beside what serves, at a lower priority, one after the other."""

    def __init__(self, stage: Stage, cut: Cutoffs) -> None:
        self._stage = stage
        self._cut = cut
        self._waiting = ["v2", "v3"]
        self._running: tuple[str, Servant] | None = None

    def look(self) -> None:
        """Starts the next training when the one before is done, and again one that was killed."""
        stage = self._stage
        if self._running is not None:
            version, servant = self._running
            servant.look()
            if not servant.finished:
                return
            stage.once(f"train-{version}", lambda: stage.story.add(f"trained beside: {servant.last_line}"))
            self._running = None
        if self._waiting:
            version = self._waiting.pop(0)
            if not stage.done(f"train-{version}"):
                argv = hafnium(*_training(stage, version, self._cut))
                self._running = (version, Servant(f"train-{version}", argv, stage.around, STEP_NICENESS))
                self._running[1].start()

    def wait(self, version: str, meanwhile: Callable[[], None]) -> Bundle:
        """The bundle of this version, when it is there."""
        otherwise = f"{version} was not trained within {TRAINING_S:g} s; see {self._stage.folders.logs}/train-{version}.log"
        _wait(TRAINING_S, otherwise, lambda: self._stage.done(f"train-{version}") or None, meanwhile)
        return open_bundle(self._stage.folders.bundle(version))

    def stop(self) -> None:
        """Ends a training that is under way."""
        if self._running is not None:
            self._running[1].stop()


# --- serving ------------------------------------------------------------------------------------------------------------------


def manifest(stage: Stage, version: str, bundle: Bundle) -> Path:
    """The YAML of a version: v1 as an InferenceService, the others as a ModelRollout; v3 with the fault."""
    o, f = stage.options, stage.folders
    faulty = version == "v3"
    repo = f.stale_features if faulty and o.fault == "stale" and stage.contract.views else f.features
    serving = Serving(
        feature_repo=str(repo.resolve()) if stage.contract.views else None, log_flush_seconds=1.0,
        fault=fault_of(o.fault, stage.contract) if faulty else None,
    )
    uri = bundle.path.resolve().as_uri()
    pace = PACE if o.data is None else PACE_FILE
    document = inference_service(bundle, uri, serving) if version == "v1" else model_rollout(bundle, uri, serving, pace)
    path = f.manifest(version)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_yaml(document))
    return path


def prepare_requests(stage: Stage, cut: Cutoffs) -> None:
    """Requests of the days that no model has seen."""
    from hafnium_training.replay_requests import score_requests

    rows = list(score_requests(stage.contract, stage.data, start=cut.replay_from, end=cut.replay_until, limit=REQUESTS_MAX))
    if not rows:
        raise StepFailedError(f"no transaction after {cut.replay_from}: nothing to replay")
    write_atomically(stage.folders.requests, "\n".join(json.dumps(r) for r in rows) + "\n")
    rate = f"{stage.options.rate_per_s:g}"
    stage.story.add(f"{len(rows)} unseen transactions from {cut.replay_from:%Y-%m-%d %H:%M} on, replayed at {rate}/s")


class Servants:
    """What runs beside the acts: `hafnium up`, the replay, the drift job, the trainings. `look` keeps them running."""

    def __init__(self, stage: Stage, retraining: Retraining) -> None:
        self._stage = stage
        self.retraining = retraining
        f = stage.folders
        port = ["--port", str(stage.options.port)] if stage.options.port is not None else []
        begun = any((f.state / "objects").glob("*.yaml"))  # the folder alone may be of an `up` that was killed at once
        files = [] if begun else [str(f.manifest("v1"))]
        self.up = Servant("up", hafnium("up", *files, "--state", str(f.state), "--look-seconds", "1", *port), stage.around)
        self.drift = Servant("drift", hafnium(
            "drift", "watch", "--state", str(f.state), "--every", "3s", "--window-max", "90s", "--min-rows", str(DRIFT_ROWS),
            "--looks", str(DRIFT_LOOKS),
        ), stage.around)
        self.replay: Servant | None = None

    def look(self) -> None:
        """Starts again whoever died."""
        for servant in (self.up, self.replay, self.drift):
            if servant is not None:
                servant.look()
        self.retraining.look()

    def start(self) -> str:
        """Starts serving, waits until v1 answers, then starts the traffic and the drift job. Returns the gateway's address."""
        stage, f = self._stage, self._stage.folders
        self.up.start()
        otherwise = f"v1 did not become ready; see {f.state}/logs and {f.logs}/up.log"
        gateway = _wait(READY_S, otherwise, lambda: _gateway(f.state), self.look)
        stage.story.add(f"v1 answers at {gateway}")
        self.replay = Servant("replay", list(python_module(
            "hafnium_local.replay", "--requests", str(f.requests), "--url", gateway, "--rate", f"{stage.options.rate_per_s:g}",
            "--journal", str(f.journal), "--summary", str(f.replay_summary), "--again",
        )), stage.around)
        self.replay.start()
        self.drift.start()
        return gateway

    def stop(self) -> None:
        """Traffic first, so that no request is cut off; then the rest."""
        self.retraining.stop()
        for servant in (self.replay, self.drift, self.up):
            if servant is not None:
                servant.stop()


def _gateway(state: Path) -> str | None:
    try:
        services = json.loads((state / "services.json").read_text(encoding="utf-8"))["services"]
        port = json.loads((state / "runtime.json").read_text(encoding="utf-8"))["gatewayPort"]
    except (OSError, ValueError, KeyError):
        return None
    return f"http://127.0.0.1:{port}" if services and all(s["ready"] for s in services) else None


def _wait(seconds: float, otherwise: str, ask: Callable[[], Any], meanwhile: Callable[[], None]) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = ask()
        if found is not None:
            return found
        meanwhile()
        time.sleep(0.2)
    raise StepFailedError(otherwise)


# --- rollouts -----------------------------------------------------------------------------------------------------------------


def roll_out(stage: Stage, version: str, servants: Servants) -> Ended:
    """Acts 5 and 6: hands the ModelRollout over and watches until it has ended; each event of its history is told once."""
    f = stage.folders
    kept = f.work / "done" / f"rolled-out-{version}.json"
    if kept.exists():
        return Ended(**read_json(kept))
    bundle = servants.retraining.wait(version, servants.look)
    path = manifest(stage, version, bundle)
    stage.once(f"apply-{version}", lambda: stage.step(
        f"apply-{version}", "rollout", "apply", str(path), "--state", str(f.state), meanwhile=servants.look
    ))
    name, digest = bundle.manifest.model_name, bundle.manifest.digest
    told: set[tuple[datetime, str]] = set()
    retried = not stage.resumed

    def ask() -> Ended | None:
        nonlocal retried
        status = read_status(f.state, name)
        if status is None or status.candidate is None or status.candidate.digest != digest:
            return None
        began = max((p.time for p in status.history if p.event == "Started"), default=None)
        for p in status.history:
            if p.event != "Look" and began is not None and p.time >= began and (p.time, p.event) not in told:
                told.add((p.time, p.event))
                stage.story.add(f"{version} {p.event}: {p.message}")
        if status.phase == "Paused" and not retried:
            retried = True  # deadlines went on while nothing ran
            stage.story.add(f"{version}: paused while the demo was interrupted; asked to go on")
            commands.retry(f.state, name, "the demo was interrupted")
        return ended(status, digest) if retried or status.phase != "Paused" else None

    otherwise = f"the rollout of {version} did not end within {ROLLOUT_S:g} s; see {f.state}/status"
    found: Ended = _wait(ROLLOUT_S, otherwise, ask, servants.look)
    write_atomically(kept, json.dumps(vars(found)))
    return found
