"""Hyperparameter search: Ray Tune runs the trials, Optuna proposes them, ASHA ends the hopeless ones early.

The same data, seed and number of trials give the same result. That rules out trials side by side: ASHA compares a trial with
those that *have* reported, and Optuna learns from those that *have* finished, so with two at a time the winner would depend on
which worker was quicker. On one machine trials therefore follow each other in one worker, which also imports torch only once. On a
Ray cluster (`at_once` above 1) they run in batches: Optuna proposes a whole batch and learns when all of it has finished, in the order of
its proposals, and no trial is ended early. That too depends on nobody's speed, and costs the epochs that ASHA would have saved.
Ray does the rest: a killed worker's trial is run again, and a killed search goes on where its state was last saved. Tune saves it every
ten seconds (less often where saving is slow), so trials of the last seconds are run again. A search that hangs goes on in the same way,
with Ray started anew. A state that is damaged (a full disk) is told, forgotten and searched anew: the result is the same, it only takes
longer.

Ray's driver is a process of its own (helper_process.py): Ray ends its driver when one of its daemons dies, and a training must not
end with it. `searching` and `search` are for the trainer's side, `warm_up` and `run_search` run in that process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.progress import Progress
from hafnium_training.fit import Epoch, Prepare, fit
from hafnium_training.helper_process import HelperProcess, HelperTimeoutError
from hafnium_training.hyperparameters import Hyperparameters

TRIALS_MAX = 1_000
WORKER_FAILURES_MAX = 2
"""A worker that is killed for lack of memory will be again; a node that goes away goes away once."""
ATTEMPTS = 3
"""Of the whole search, when trials are missing at its end."""
OBJECT_STORE_BYTES = 256 * 1024 * 1024
SOCKET_PATH_MAX = 107
"""Linux's limit."""
SOCKET_SUFFIX = 64
"""What Ray adds to its folder: session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store."""
START_TIMEOUT_S = 120.0
LEFT_BEHIND_S = 86_400.0
SILENCE_S_MAX = 900.0
"""Without a report of any trial the search hangs: an epoch takes seconds, and a node that a cluster has yet to start some minutes."""
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
METRIC = "best_pr_auc"
GRACE_EPOCHS = 3


class DamagedSearchError(HafniumError):
    """The state of an interrupted search can't be gone on with."""


class _Listener:
    """Tells how many trials have ended, each once, also those that had before the search went on."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._told = progress, 0

    def hear(self, ended: int) -> None:
        # A report that ends nothing is told as well, as 0: it is how the other process knows that the search doesn't hang.
        more = max(0, ended - self._told)
        self._told += more
        self._progress.advance(more)


_LISTENERS: dict[str, _Listener] = {}
"""Search's key → who hears of its trials."""


def _hear(key: str, tune_controller: Any, trial: Any, *, ends: bool) -> None:
    """A function of this module, and not a method of the schedulers: those are pickled with copies of the globals that they name, and
    a search that goes on would tell a copy."""
    if key in _LISTENERS:
        others = sum(t.is_finished() for t in tune_controller.get_trials() if t.trial_id != trial.trial_id)
        _LISTENERS[key].hear(others + ends)


@dataclass(frozen=True)
class Trial:
    """One set of hyperparameters and how far it came. `epochs` is less than asked for when it was stopped early."""

    number: int
    hyperparameters: Hyperparameters
    validation_pr_auc: float
    epochs: int
    node: str = field(default="", compare=False)
    """Host that ran it: a pod's name on a cluster."""


@dataclass(frozen=True)
class Searched:
    best: Hyperparameters
    trials: tuple[Trial, ...]
    error: str = ""
    """Why a trial is missing; empty when none is."""


def search_key(*facts: object) -> str:
    """Name of a search: the same facts (data, contract, seed, …) find the same unfinished search again."""
    return "search-" + hashlib.sha256("\n".join(str(f) for f in facts).encode()).hexdigest()[:12]


@contextlib.contextmanager
def searching(at_once: int = 1) -> Generator[HelperProcess]:
    """A process with Ray on this machine, or on the cluster that RAY_ADDRESS names, from `with` to its end.

    It begins to start at once: eight seconds that loading the data can share. `at_once`: CPUs for trials, on this machine.
    """
    folder = _ray_folder()
    try:
        with HelperProcess("hafnium_training.search", str(folder), at_once) as helper:
            yield helper
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def search(
    helper: HelperProcess, prepared: Prepare, *, trials: int, epochs: int, seed: int, place: Path | str, key: str, progress: Progress,
    at_once: int = 1,
) -> Searched:
    """Runs `trials` trials (the first one has the defaults) and returns the best by validation PR-AUC.

    `place`: where Ray keeps the state, a folder (that every node of a cluster has) or s3://BUCKET/PREFIX; a search of the same `key` that
    was killed there goes on, unless its state is damaged. A trial whose worker died is run again up to WORKER_FAILURES_MAX times; a search
    whose trials are not all there is searched anew, and one that tells nothing for SILENCE_S_MAX goes on, up to ATTEMPTS times in all.
    Trials that fail even then are left out and told. Raises HafniumError when every trial failed, or the last attempt tells nothing.
    """
    if not 1 <= trials <= TRIALS_MAX:
        raise InputError(f"--trials {trials}: expected 1 to {TRIALS_MAX}")
    if not 1 <= at_once <= trials:
        raise InputError(f"--at-once {at_once}: expected 1 to the number of trials, {trials}")
    where = trial_storage(place)
    found, heard = Searched(Hyperparameters(), ()), _Once(progress)
    for attempt in range(1, ATTEMPTS + 1):
        _wait_for_ray(helper)
        last, why, damaged = attempt == ATTEMPTS, "", True
        try:
            found = helper.call(
                "run_search", prepared, trials, epochs, seed, where, key, at_once, timeout_s=SILENCE_S_MAX, progress=heard)
            missing = trials - len(found.trials)
            if not missing or last:
                break
            # A dying raylet can take trials with it, and a search without them would have another result. It is run anew, and whole.
            why = f"{missing} of {trials} trials failed"
        except HelperTimeoutError as e:
            why, damaged = f"no trial has told anything for {SILENCE_S_MAX:g} s", False  # what hangs is Ray, or the machine
            if last:
                raise HafniumError(
                    f"the search failed: {why}, {ATTEMPTS} times. Trials that have finished are kept in {where.shown(key)}: run the same "
                    "command again to go on with them, or remove it to search anew; with --trials 1 training needs no search"
                ) from e
        except DamagedSearchError as e:
            why = str(e)
            if last:
                raise
        progress.event(f"{why}; {'searching anew' if damaged else 'starting Ray again and going on'} ({attempt} of {ATTEMPTS - 1})")
        helper.restart()
        if damaged:
            where.forget(key)
    if found.error:
        progress.event(f"{trials - len(found.trials)} of {trials} trials failed {ATTEMPTS} times and are left out: {found.error}")
    if not found.trials:
        raise HafniumError(f"the search failed: all {trials} trials ended with an error: {found.error or 'no trial reported'}")
    return found


class _Once:
    """Passes on each trial's end once, however often the search begins again: it then tells a stage, and counts from 0."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._ended, self._told = progress, 0, 0

    def stage(self, name: str, total: int) -> None:
        del name, total
        self._ended = 0

    def advance(self, count: int = 1) -> None:
        self._ended += count
        if self._ended > self._told:
            self._progress.advance(self._ended - self._told)
            self._told = self._ended

    def event(self, text: str) -> None:
        self._progress.event(text)


def _wait_for_ray(helper: HelperProcess) -> None:
    try:
        helper.call("ready", timeout_s=START_TIMEOUT_S)
    except HelperTimeoutError as e:
        raise HafniumError(f"Ray did not start within {START_TIMEOUT_S:g} s; with --trials 1 training needs no Ray") from e


@dataclass(frozen=True)
class TrialStorage:
    """Where Ray Tune keeps its state."""

    place: str
    """An absolute path, or an s3:// URI."""

    def open(self) -> tuple[str, Any]:
        """What Ray takes: (path, pyarrow filesystem or None for this machine's)."""
        if not self.place.startswith("s3://"):
            return self.place, None
        from pyarrow.fs import FileSystem

        filesystem, path = FileSystem.from_uri(self.place)
        return path.rstrip("/"), filesystem

    def shown(self, key: str) -> str:
        """Where a search's state is, for messages."""
        return f"{self.place.partition('?')[0]}/{key}"

    def forget(self, key: str) -> None:
        """Removes a search's state, if there is any."""
        path, filesystem = self.open()
        if filesystem is None:
            shutil.rmtree(Path(path) / key, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_dir(f"{path}/{key}")


def trial_storage(given: Path | str) -> TrialStorage:
    """A folder, or s3://BUCKET/PREFIX (AWS's usual variables; `?endpoint_override=HOST:PORT&scheme=http`). Raises InputError."""
    text = str(given)
    if "://" not in text:
        return TrialStorage(str(Path(text).resolve()))
    bucket = text.removeprefix("s3://").partition("?")[0]
    if not text.startswith("s3://") or not bucket.partition("/")[2].strip("/") or "@" in bucket:
        raise InputError(f"--trial-storage {text.partition('?')[0]}: expected a folder or s3://BUCKET/PREFIX, without credentials")
    return TrialStorage(text)


def run_trial(config: dict[str, Any], prepared: Prepare, epochs: int, seed: int) -> None:
    """One trial, inside a Ray worker."""
    from ray import tune

    def report(epoch: Epoch) -> None:
        nonlocal best
        best = max(best, epoch.validation_pr_auc)
        tune.report({METRIC: best, "epoch": epoch.number})

    best = 0.0
    fit(prepared, Hyperparameters(**config), epochs=epochs, seed=seed, on_epoch=report)


def run_search(
    prepared: Prepare, trials: int, epochs: int, seed: int, where: TrialStorage, key: str, at_once: int = 1, *, progress: Progress,
) -> Searched:
    """The search itself, in the process with Ray. See `search`."""
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Watched(ASHAScheduler):
        """Tells of reports and of finished trials (by name: Tune pickles its schedulers, and a progress bar can't be).

        It is not a Tune callback, because one of those makes Tune import MLflow, to see whether it is its own.
        """

        search_key = key

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, trial, result)
            _hear(self.search_key, tune_controller, trial, ends=True)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            _hear(self.search_key, tune_controller, trial, ends=False)
            return super().on_trial_result(tune_controller, trial, result)

    class WatchedBatches(FIFOScheduler):
        """The same for trials side by side: none is ended early."""

        search_key = key

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(tune_controller, trial, result)
            _hear(self.search_key, tune_controller, trial, ends=True)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            _hear(self.search_key, tune_controller, trial, ends=False)
            return super().on_trial_result(tune_controller, trial, result)

    trainable = tune.with_resources(
        tune.with_parameters(run_trial, prepared=prepared, epochs=epochs, seed=seed), {"cpu": 1},
    )
    defaults = Hyperparameters()
    # a plain list: reported metrics, and with them the search, must not carry anything that differs from run to run
    names = ("learning_rate", "weight_decay", "batch_rows", "groups", "units", "hidden", "embedding", "positive_power", "smoothness")
    space: dict[str, Any] = {
        "learning_rate": tune.loguniform(0.01, 0.06),
        "weight_decay": tune.loguniform(1e-3, 3e-1),
        "batch_rows": tune.choice([512, 1024, 2048]),
        "groups": tune.choice([3, 4, 6]),
        "units": tune.choice([3, 4, 6]),
        "hidden": tune.choice([8, 12, 16]),
        "embedding": tune.choice([4, 6, 8]),
        "positive_power": tune.uniform(0.0, 0.5),
        "smoothness": tune.loguniform(1e-2, 2e-1),
    }
    path, filesystem = where.open()
    progress.stage("search", trials)
    going_on = tune.Tuner.can_restore(f"{path}/{key}", storage_filesystem=filesystem)
    if going_on:
        progress.event("going on with a search that was interrupted")
        with _damage_named(key):
            _refuse_cut_off(f"{path}/{key}", filesystem)
            tuner = tune.Tuner.restore(
                f"{path}/{key}", trainable=trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem)
    else:
        early: dict[str, Any] = {
            "time_attr": "epoch", "max_t": max(epochs, GRACE_EPOCHS), "grace_period": min(GRACE_EPOCHS, epochs), "reduction_factor": 3,
        }
        tuner = tune.Tuner(
            trainable, param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC, mode="max", num_samples=trials, reuse_actors=True,
                search_alg=ConcurrencyLimiter(
                    OptunaSearch(seed=seed, points_to_evaluate=[{n: getattr(defaults, n) for n in names}]),
                    max_concurrent=at_once, batch=at_once > 1,
                ),
                scheduler=Watched(**early) if at_once == 1 else WatchedBatches(),
            ),
            run_config=tune.RunConfig(
                name=key, storage_path=path, storage_filesystem=filesystem, verbose=0,
                failure_config=tune.FailureConfig(max_failures=WORKER_FAILURES_MAX),
            ),
        )
    _LISTENERS[key] = listener = _Listener(progress)
    try:
        with _damage_named(key) if going_on else contextlib.nullcontext():
            results = tuner.fit()
    finally:
        del _LISTENERS[key]
    done: list[Trial] = []
    for number in range(len(results)):
        result = results[number]
        if result.error is None and result.metrics and METRIC in result.metrics and result.config:
            hyper = Hyperparameters(**{n: result.config[n] for n in names})
            done.append(Trial(
                number, hyper, float(result.metrics[METRIC]), int(result.metrics["epoch"]), str(result.metrics.get("hostname", "")),
            ))
    listener.hear(len(done))
    error = next((str(e).strip().splitlines()[-1] for i in range(len(results)) if (e := results[i].error) is not None), "")
    best = max(done, key=lambda t: (t.validation_pr_auc, -t.number), default=None)
    return Searched(defaults if best is None else best.hyperparameters, tuple(done), error if len(done) < trials else "")


@contextlib.contextmanager
def _damage_named(key: str) -> Generator[None]:
    """Whatever Tune raises over a saved state, as one error: it reads several files, of which any may be cut off."""
    try:
        yield
    except Exception as e:
        raise DamagedSearchError(f"the saved state of the interrupted search {key} is damaged ({type(e).__name__}: {str(e)[:200]})") from e


def _refuse_cut_off(folder: str, filesystem: Any) -> None:
    """Raises what unpickling raises. Tune takes a searcher that it can't read for one that has nothing to suggest, and waits for ever."""
    from pyarrow.fs import FileSelector, LocalFileSystem

    opened = filesystem or LocalFileSystem()
    for info in opened.get_file_info(FileSelector(folder)):
        if info.base_name.startswith("searcher-state-") and info.base_name.endswith(".pkl"):
            with opened.open_input_stream(info.path, compression=None) as stream:
                pickle.loads(stream.read())  # noqa: S301 - Tune reads the same file in the same way


def warm_up(folder: str, at_once: int = 1) -> None:
    """Starts Ray in this process, with its files in `folder` and `at_once` CPUs, or joins the cluster of RAY_ADDRESS.

    Raises HafniumError when it doesn't start.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            _start_here(ray, {"_temp_dir": folder, "num_cpus": at_once, **quiet})
    except Exception as e:  # Ray raises RuntimeError, ValueError, ConnectionError and its own for the same thing
        raise HafniumError(f"Ray did not start: {e}; with --trials 1 training needs no Ray") from e
    # No warm worker: Tune's actors have an environment of their own and never take over a worker that ran a task.
    importlib.import_module("ray.tune.search.optuna")


def ready() -> None:
    """Answers after `warm_up` has: then Ray runs."""


def _ray_folder() -> Path:
    base = tempfile.gettempdir()
    name = f"hfr{os.getpid()}-"
    fits = len(base) + 1 + len(name) + 8 + SOCKET_SUFFIX <= SOCKET_PATH_MAX
    short = base if fits else "/tmp"  # noqa: S108 - see SOCKET_PATH_MAX
    for old in Path(short).glob("hfr*-*"):  # of searches that were killed: nobody else removes them
        owner = old.name.removeprefix("hfr").partition("-")[0]
        with contextlib.suppress(OSError):
            idle_s = time.time() - old.stat().st_mtime  # the owner may live where we can't see it: in another container
            if owner.isdigit() and not psutil.pid_exists(int(owner)) and idle_s > LEFT_BEHIND_S:
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=name, dir=short))


def _start_here(ray: Any, options: dict[str, Any]) -> None:
    """Starts Ray on this machine, a second time when the first fails: it picks free ports, and another process may be quicker."""
    for last in (False, True):
        try:
            ray.init(object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **options)
            return
        except Exception:  # Ray raises RuntimeError, ValueError, ConnectionError and its own for the same thing
            ray.shutdown()
            if last:
                raise
