"""The search gives one answer for one seed, through killed workers and killed searches."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hafnium_training_cases import lender, lender_table

from hafnium_contract.errors import HafniumError, InputError
from hafnium_contract.progress import Silent
from hafnium_training.dataset import dataset_of, split_by_time
from hafnium_training.fit import Prepare, fit, prepare
from hafnium_training.helper_process import HelperProcess, HelperTimeoutError
from hafnium_training.hyperparameters import Hyperparameters, parse_hyperparameters, read_hyperparameters
from hafnium_training.search import (
    SILENCE_S_MAX,
    DamagedSearchError,
    Searched,
    Trial,
    search,
    search_key,
    searching,
    trial_storage,
)

TRIALS, EPOCHS = 2, 6


def prepared() -> Prepare:
    return prepare(split_by_time(dataset_of(lender_table(rows=1500), lender())), 0)


def run_search(folder: Path, key: str = "k", trials: int = TRIALS, at_once: int = 1) -> Searched:
    with searching(at_once) as ray:
        return search(
            ray, prepared(), trials=trials, epochs=EPOCHS, seed=3, place=folder, key=key, progress=Silent(), at_once=at_once)


VICTIMS: dict[str, Callable[[str], bool]] = {
    "worker": lambda line: "ImplicitFunc" in line or "run_trial" in line,
    "raylet": lambda line: line.split(" ")[0].endswith("raylet/raylet"),
}


def find(victim: str) -> psutil.Process | None:
    """One of Ray's processes below this one."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if VICTIMS[victim](" ".join(child.cmdline())):
                return child
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return run_search(tmp_path_factory.mktemp("search"))


@pytest.mark.slow
def test_the_same_search_twice_gives_the_same_trials_also_below_a_relative_path(
    undisturbed: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(undisturbed.trials) == TRIALS
    assert undisturbed.trials[0].hyperparameters == Hyperparameters()
    assert undisturbed.best == max(undisturbed.trials, key=lambda t: t.validation_pr_auc).hyperparameters
    monkeypatch.chdir(tmp_path)
    assert run_search(Path("below")) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_is_replaced_and_the_result_is_the_same(undisturbed: Searched, tmp_path: Path, victim: str) -> None:
    killed = threading.Event()

    def kill_while_a_trial_runs() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not killed.is_set():
            found = find(victim) if find("worker") is not None else None
            if found is not None:
                found.kill()
                killed.set()
                return
            time.sleep(0.02)
    killer = threading.Thread(target=kill_while_a_trial_runs)
    killer.start()
    try:
        found = run_search(tmp_path)
    finally:
        alive = killed.is_set()
        killed.set()
        killer.join()
    assert alive, f"no {victim} was ever seen, so none was killed"
    assert found == undisturbed


KILLED_SEARCH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_search import run_search
run_search(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a search was killed after its first trial had begun."""
    place = tmp_path_factory.mktemp("killed")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", ""))),
        "TUNE_GLOBAL_CHECKPOINT_S": "0",
    }
    said = place / "said.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_SEARCH, str(place), str(Path(__file__).parent)], env=environment, start_new_session=True,
            stdout=log, stderr=log,
        )
    try:
        deadline = time.monotonic() + 200
        state = place / "k"
        while time.monotonic() < deadline and process.poll() is None:
            if list(state.glob("experiment_state*.json")) and list(state.glob("run_trial_*")):
                break
            time.sleep(0.05)
        assert process.poll() is None, f"the search ended before it could be killed: {said.read_text()[-4000:]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return place


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("damaged", "anew"), [
    pytest.param("", False, id="whole"), pytest.param("experiment_state*.json", True, id="experiment_state"),
    pytest.param("searcher-state-*.pkl", True, id="searcher-state"), pytest.param("tuner.pkl", True, id="tuner"),
])
def test_a_killed_search_goes_on_or_is_searched_anew_where_its_state_is_cut_off(
    undisturbed: Searched, killed: Path, tmp_path: Path, damaged: str, anew: bool,
) -> None:
    shutil.copytree(killed / "k", tmp_path / "k")
    if damaged:  # what a full disk leaves: files that are there, and cut off
        (file, *_) = (tmp_path / "k").glob(damaged)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    heard = Heard()
    with searching() as ray:
        found = search(ray, prepared(), trials=TRIALS, epochs=EPOCHS, seed=3, place=tmp_path, key="k", progress=heard)
    assert "going on with a search that was interrupted" in heard.events
    assert found == undisturbed
    assert heard.ended == TRIALS, "trials that a search that goes on has run are told, too"
    assert any("search k is damaged" in e and "searching anew (1 of 2)" in e for e in heard.events) == anew


class Heard(Silent):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.ended = 0

    def event(self, text: str) -> None:
        self.events.append(text)

    def advance(self, count: int = 1) -> None:
        self.ended += count


class Losing(HelperProcess):
    """Loses a trial in each of its first searches, as a dying raylet was seen to do."""

    def __init__(self, times: int, kept: int) -> None:
        self.left, self.kept, self.restarts = times, kept, 0

    def call(self, function: str, *args: Any, **more: Any) -> Any:
        if function == "ready":
            return None
        self.left -= 1
        trials = tuple(Trial(i, Hyperparameters(), 0.5, 1) for i in range(self.kept if self.left >= 0 else 2))
        return Searched(Hyperparameters(), trials, "the node died" if len(trials) < 2 else "")

    def restart(self) -> None:
        self.restarts += 1


@pytest.mark.parametrize(("times", "kept", "restarts", "trials"), [(0, 1, 0, 2), (1, 1, 1, 2), (2, 0, 2, 2), (9, 1, 2, 1)])
def test_a_search_that_lost_trials_is_run_anew_and_whole(tmp_path: Path, times: int, kept: int, restarts: int, trials: int) -> None:
    helper = Losing(times, kept)
    (tmp_path / "k").mkdir()
    found = search(helper, prepared(), trials=2, epochs=1, seed=0, place=tmp_path, key="k", progress=Silent())
    assert (helper.restarts, len(found.trials)) == (restarts, trials)
    assert (tmp_path / "k").exists() == (restarts == 0)


class Stuck(Losing):
    """Says nothing in its first searches, or tells a damaged state."""

    def __init__(self, times: int, error: HafniumError) -> None:
        super().__init__(0, 2)
        self.times, self.error = times, error

    def call(self, function: str, *args: Any, **more: Any) -> Any:
        if function == "ready":
            return None
        assert more["timeout_s"] == SILENCE_S_MAX, "however many trials there are"
        more["progress"].stage("search", 2)
        more["progress"].advance(1)
        self.times -= 1
        if self.times >= 0:
            raise self.error
        more["progress"].advance(1)
        return super().call(function, *args, **more)


@pytest.mark.parametrize(("error", "said", "kept"), [
    (HelperTimeoutError("no answer"), "no trial has told anything for 900 s; starting Ray again and going on (1 of 2)", True),
    (DamagedSearchError("the state is damaged"), "the state is damaged; searching anew (1 of 2)", False),
], ids=["silence", "damage"])
def test_a_search_that_hangs_goes_on_and_one_that_can_not_is_run_anew(tmp_path: Path, error: HafniumError, said: str, kept: bool) -> None:
    (tmp_path / "k").mkdir()
    helper, heard = Stuck(1, error), Heard()
    found = search(helper, prepared(), trials=2, epochs=1, seed=0, place=tmp_path, key="k", progress=heard)
    assert (len(found.trials), helper.restarts, heard.ended) == (2, 1, 2)
    assert heard.events == [said]
    assert (tmp_path / "k").exists() == kept, "trials that have finished are in it"


def test_a_search_that_never_answers_says_where_its_finished_trials_are_and_a_damaged_one_what_is_damaged(tmp_path: Path) -> None:
    def searched(error: HafniumError) -> Searched:
        return search(Stuck(9, error), prepared(), trials=2, epochs=1, seed=0, place=tmp_path, key="k", progress=Heard())

    (tmp_path / "k").mkdir()
    with pytest.raises(HafniumError, match=f"told anything for 900 s, 3 times.* are kept in {tmp_path}/k: .* remove it to search anew"):
        searched(HelperTimeoutError(""))
    assert (tmp_path / "k").exists()
    with pytest.raises(DamagedSearchError, match="it is damaged"):
        searched(DamagedSearchError("it is damaged"))


class Stopping(Heard):
    """Stops the process with Ray, which then says nothing more, once `after` trials have ended."""

    def __init__(self, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.after, self.stopped_at = after, 0.0
        self._patch = monkeypatch
        monkeypatch.setattr("hafnium_training.search.SILENCE_S_MAX", 60.0)

    def advance(self, count: int = 1) -> None:
        super().advance(count)
        if self.ended >= self.after and not self.stopped_at:
            (helper,) = (c for c in psutil.Process().children() if "hafnium_training.helper_process" in c.cmdline())
            helper.suspend()
            self.stopped_at = time.time()
            self._patch.setattr("hafnium_training.search.SILENCE_S_MAX", SILENCE_S_MAX)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_that_had_finished_before_a_search_hung_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0")
    heard = Stopping(2, monkeypatch)
    with searching() as ray:
        found = search(ray, prepared(), trials=8, epochs=EPOCHS, seed=3, place=tmp_path, key="k", progress=heard)
    assert heard.stopped_at, "the process with Ray was never stopped"
    assert "going on with a search that was interrupted" in heard.events
    assert [t.number for t in found.trials] == list(range(8))
    assert heard.ended == 8
    state = json.loads(max((tmp_path / "k").glob("experiment_state*.json")).read_text())
    ended = [json.loads(facts)["last_result_time"] for _, facts in state["trial_data"]]
    assert min(ended) < heard.stopped_at < max(ended), "the first trial was run again"


def test_a_search_whose_trials_all_fail_says_why(tmp_path: Path) -> None:
    with pytest.raises(HafniumError, match="all 2 trials ended with an error: the node died"):
        search(Losing(9, 0), prepared(), trials=2, epochs=1, seed=0, place=tmp_path, key="k", progress=Silent())


def test_a_number_of_trials_out_of_bounds_is_refused(tmp_path: Path) -> None:
    with HelperProcess("hafnium_training.hyperparameters") as helper, pytest.raises(InputError, match="--trials 0"):
        search(helper, prepared(), trials=0, epochs=1, seed=0, place=tmp_path, key="k", progress=Silent())


@pytest.mark.slow
@pytest.mark.timeout(900)  # two searches; on a machine at forty times its load one took 220 s
def test_trials_side_by_side_give_one_answer_whoever_is_quicker(tmp_path: Path) -> None:
    found = [run_search(tmp_path / name, trials=3, at_once=2) for name in ("one", "two")]
    assert found[0] == found[1]
    assert [t.number for t in found[0].trials] == [0, 1, 2]
    assert found[0].trials[0].hyperparameters == Hyperparameters()
    assert all(t.epochs == EPOCHS and t.node for t in found[0].trials), "none is ended early"


def test_more_trials_at_once_than_there_are_is_refused(tmp_path: Path) -> None:
    with HelperProcess("hafnium_training.hyperparameters") as helper, pytest.raises(InputError, match="--at-once 3: expected 1 to"):
        search(helper, prepared(), trials=2, epochs=1, seed=0, place=tmp_path, key="k", progress=Silent(), at_once=3)


def test_places_of_trials_are_told_apart(tmp_path: Path) -> None:
    assert trial_storage(tmp_path / "t").open() == (str(tmp_path / "t"), None)
    assert trial_storage("s3://bucket/prefix?scheme=http").place.startswith("s3://")
    for place in ("s3://bucket", "s3://key:secret@bucket/p", "gs://bucket/p", "http://h/p?token=secret"):
        with pytest.raises(InputError, match="--trial-storage") as e:
            trial_storage(place)
        assert "token" not in str(e.value)


def test_other_data_is_another_search() -> None:
    assert search_key("sha256:a", 4) == search_key("sha256:a", 4)
    assert search_key("sha256:a", 4) != search_key("sha256:b", 4)


def test_training_twice_gives_the_same_weights_and_another_seed_others() -> None:
    data = prepared()
    weights = [
        [p.tolist() for p in fit(data, Hyperparameters(), epochs=3, seed=seed).network.parameters()] for seed in (5, 5, 6)
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_training_learns_and_stops_when_nothing_gets_better() -> None:
    fitted = fit(prepared(), Hyperparameters(), epochs=60, seed=0)
    assert fitted.best.validation_pr_auc > 0.5
    assert len(fitted.epochs) < 60
    assert fitted.best.validation_pr_auc == max(e.validation_pr_auc for e in fitted.epochs)


@pytest.mark.parametrize(("text", "expected"), [
    ("{not json", "not JSON"), ('{"learningRate": -1}', "learningRate"), ('{"learning": 1}', "hyperparameters are"),
    ("[]", "hyperparameters"),
])
def test_hyperparameters_that_make_no_sense_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(InputError, match=expected):
        read_hyperparameters(file)
    with pytest.raises(InputError, match="can't be read"):
        read_hyperparameters(tmp_path / "absent.json")


def test_hyperparameters_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    given = parse_hyperparameters({"learningRate": 0.012345678901234, "groups": 3}, "test")
    file.write_text(given.model_dump_json())
    assert read_hyperparameters(file) == given
