"""What CI does about Kubernetes: a cluster that can't be had is said and no failure, and nothing that it found running is stopped.

Its parts are stand-ins here: the real cluster takes half an hour to be built.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cluster needs root, and the script asks for it first")
SUITES = sorted(p.stem for p in (ROOT / "tests/cluster").glob("test_*.py"))
PARTS = ("predictor", "transformer", "training", "monitoring", "rollout")
LEFT_BEHIND = """case "$*" in
*" -n hafnium-test-0a1b2c "*) [[ $1 != get ]] || echo modelrollout.hafnium.dev/held;;
*clusterroles*) printf '%s\\n' clusterrole.rbac.authorization.k8s.io/{view,hafnium-viewer,hafnium-viewer-hafnium-test-0a1b2c} \\
  validatingadmissionpolicy.admissionregistration.k8s.io/{hafnium-records,hafnium-records-hafnium-test-0a1b2c};;
"get namespaces -l hafnium.dev/test=quickstart"*) echo namespace/risk;;
"get namespaces"*) printf 'namespace/%s\\n' default hafnium-system my-hafnium-test-1 hafnium-test-0a1b2c;;
esac"""


class Checkout:
    """A tree with the script, a cluster beside it and a pytest, all of which say in `calls` that they were called."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cluster, self.state = folder / "main", folder / "shared/cluster", folder / "state"
        (self.root / ".ci").mkdir(parents=True)
        (self.state / "run").mkdir(parents=True)
        shutil.copy(ROOT / ".ci/cluster", self.root / ".ci/cluster")
        self.calls, self.commands = folder / "calls", folder / "commands"
        self.program(self.root / ".venv/bin/pytest", "exit 0")
        self.program(folder / "bin/kubectl", "exit 0")
        self.environment = os.environ | {"HAFNIUM_CLUSTER_HOME": str(self.state), "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def program(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "$(basename "$0")" >> {self.calls}\n'
                        f'echo "$(basename "$0") $*" >> {self.commands}\n{body}\n')
        path.chmod(0o755)

    def with_cluster(self, up: str = "echo export UP=1") -> None:
        for name, body in (("up", up), ("down", "exit 0"), ("image", "exit 0")):
            self.program(self.cluster / name, body)

    def start(self, limit_s: int = 4000) -> subprocess.Popen[str]:
        return subprocess.Popen([str(self.root / ".ci/cluster"), str(limit_s)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=self.environment)

    def run(self, limit_s: int = 4000) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.root / ".ci/cluster"), str(limit_s)], capture_output=True, text=True, env=self.environment,
                              timeout=120, check=False)

    @property
    def called(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []

    @property
    def commanded(self) -> list[str]:
        """Names with their arguments."""
        return self.commands.read_text().splitlines() if self.commands.exists() else []


def until(check: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_without_a_cluster_beside_the_checkout_it_says_so_in_one_line(checkout: Checkout) -> None:
    done = checkout.run()
    assert done.returncode == 0
    assert "NOT TESTED on Kubernetes: there is no ../shared/cluster beside this checkout" in done.stderr
    assert checkout.called == []


def test_what_it_started_it_stops(checkout: Checkout) -> None:
    checkout.with_cluster()
    done = checkout.run()
    assert done.returncode == 0, done.stderr
    assert checkout.called == ["up", *["kubectl"] * 4, *["image"] * 5, *["pytest"] * len(SUITES), "down"]
    assert "up --extras --kuberay" in checkout.commanded


def test_each_suite_of_the_folder_is_run_and_no_other(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.run()
    ran = [Path(c.split()[4]).stem for c in checkout.commanded if c.startswith("pytest ")]
    assert sorted(ran) == SUITES
    assert ran[:2] == ["test_objects", "test_access"], "the quick ones that everything rests on come first"


def test_suites_for_which_time_is_lacking_are_named_and_no_failure(checkout: Checkout) -> None:
    checkout.with_cluster()
    done = checkout.run(limit_s=1000)
    assert done.returncode == 0
    late = re.findall("NOT TESTED on Kubernetes, for want of time .*: (.*)", done.stderr)
    assert "test_story" in late[0].split()
    ran = {Path(c.split()[4]).stem for c in checkout.commanded if c.startswith("pytest ")}
    assert ran.isdisjoint(late[0].split())
    assert sorted(ran | set(late[0].split())) == SUITES


def test_knative_comes_with_it_where_it_was_built_before(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.state / "bin/knative-controller", "exit 0")
    checkout.run()
    assert "up --extras --kuberay --knative" in checkout.commanded


def test_a_cluster_that_ran_before_is_left_running(checkout: Checkout) -> None:
    checkout.with_cluster()
    process = subprocess.Popen(["sleep", "600"])
    named = subprocess.Popen(["bash", "-c", "read", str(checkout.state)], stdin=subprocess.PIPE)
    try:
        (checkout.state / "run/etcd.pid").write_text(f"{process.pid} 5510628\n")
        checkout.run()
        assert checkout.called[-1] == "down", "a pid that is another's by now is no cluster"
        checkout.calls.unlink()
        (checkout.state / "run/etcd.pid").write_text(f"{named.pid} 5510628\n")
        done = checkout.run()
        assert "it is left running" in done.stderr
        assert "down" not in checkout.called
    finally:
        for p in (process, named):
            p.kill()
            p.wait()


@pytest.mark.parametrize("up", ["sleep 60", "echo no space left >&2; exit 1"], ids=["too slow", "it fails"])
def test_a_cluster_that_does_not_come_up_is_said_loudly_and_stopped(checkout: Checkout, up: str) -> None:
    checkout.with_cluster(up)
    done = checkout.run(limit_s=903)
    assert done.returncode == 0
    assert "NOT TESTED on Kubernetes: the cluster was not up within" in done.stderr
    assert checkout.called == ["up", "down"]


def test_too_little_time_is_said_and_nothing_is_started(checkout: Checkout) -> None:
    checkout.with_cluster()
    done = checkout.run(limit_s=600)
    assert (done.returncode, checkout.called) == (0, [])
    assert "too few to begin" in done.stderr


def test_a_failing_test_fails_and_the_cluster_is_stopped_all_the_same(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.root / ".venv/bin/pytest", "exit 1")
    assert checkout.run().returncode == 1
    assert checkout.called[-2:] == ["pytest", "down"]


def test_a_test_that_fails_once_is_named_and_one_that_fails_twice_fails(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.root / ".venv/bin/pytest", '[[ $* == *--last-failed* || $* != *test_jobs* ]]')
    done = checkout.run()
    assert done.returncode == 0
    assert re.findall("FLAKY on Kubernetes: tests of (.*) failed", done.stderr) == ["test_jobs"]
    checkout.program(checkout.root / ".venv/bin/pytest", "[[ $* != *test_jobs* ]]")
    again = checkout.run()
    assert again.returncode == 1
    assert "FLAKY" not in again.stderr


def test_an_image_that_cannot_be_built_fails_and_the_other_tests_run(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.cluster / "image", "echo hashes do not match; exit 1")
    done = checkout.run()
    assert done.returncode == 1
    assert done.stderr.count("no image of the") == 5
    assert "hashes do not match" in done.stderr
    assert "pytest" in checkout.called


@pytest.mark.parametrize("status", [1, 2, 125, 126, 127, 143])
def test_one_image_that_cannot_be_built_is_enough_to_fail(checkout: Checkout, status: int) -> None:
    checkout.with_cluster()
    checkout.program(checkout.cluster / "image", f'[[ $1 != *rollout* ]] || exit {status}')
    checkout.program(checkout.root / ".venv/bin/pytest", f"env | grep -o 'HAFNIUM_.*_IMAGE=.*' >> {checkout.commands}; exit 0")
    done = checkout.run()
    assert done.returncode == 1
    assert f"FAILED: no image of the rollout: its build ended with status {status}" in done.stderr
    assert "test_install,test_story" in done.stderr
    assert [c for c in checkout.commanded if c.startswith("HAFNIUM_ROLLOUT_IMAGE")] == []
    assert "HAFNIUM_TRAINING_IMAGE=localhost/hafnium-training:ci" in checkout.commanded


@pytest.mark.parametrize("status", [124, 137])
def test_an_image_that_is_not_built_in_time_is_said_with_its_suites_and_no_failure(checkout: Checkout, status: int) -> None:
    checkout.with_cluster()
    checkout.program(checkout.cluster / "image", f'[[ $1 != *training* ]] || exit {status}')
    done = checkout.run()
    assert done.returncode == 0
    assert re.findall("NOT TESTED on Kubernetes: no image of the (.*) within 600 s, so not all of (.*)", done.stderr) == [
        ("training", "test_jobs,test_install,test_story,test_staging_overlay,test_knative_overlay,test_trials_bucket")]
    assert "pytest" in checkout.called


def test_a_build_that_takes_too_long_is_ended_and_those_after_it_are_named(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.cluster / "image", "sleep 100")
    done = checkout.run(limit_s=904)
    assert done.returncode == 0
    assert re.findall("NOT TESTED on Kubernetes: no image of the ([a-z]+) ", done.stderr) == list(PARTS)
    assert 1 <= checkout.called.count("image") < 5
    assert "pytest" in checkout.called


def test_the_status_of_failing_tests_is_told_also_after_a_broken_build(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.cluster / "image", "exit 1")
    checkout.program(checkout.root / ".venv/bin/pytest", "exit 3")
    assert checkout.run().returncode == 3


def test_images_are_those_of_make_test_cluster_and_their_suites_are_there(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.run()
    made = re.search("^IMAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert made
    named = [image.split(":") for image in made[1].split()]
    assert [c.split()[1:4] for c in checkout.commanded if c.startswith("image ")] == [
        [f"localhost/hafnium-{part}:ci", ".", f"{folder}/Dockerfile"] for folder, part in named]
    suites = set(re.findall(r"\btest_[a-z_]+(?=[,\n])", (ROOT / ".ci/cluster").read_text().split("images=(")[1].split("\n)")[0] + "\n"))
    assert suites == {"test_serving", "test_install", "test_story", "test_jobs", "test_collocated", "test_staging_overlay",
                      "test_knative_overlay", "test_trials_bucket"}
    assert all((ROOT / "tests/cluster" / f"{s}.py").is_file() for s in suites)


@pytest.mark.parametrize("what", ["up", "image", "pytest"])
def test_a_signal_is_heard_at_once_and_the_cluster_is_stopped(checkout: Checkout, what: str) -> None:
    """Without a look at a clock: what runs would take ten minutes, and this test waits for one."""
    checkout.with_cluster()
    place = {"up": checkout.cluster / "up", "image": checkout.cluster / "image", "pytest": checkout.root / ".venv/bin/pytest"}[what]
    checkout.program(place, "exec sleep 600")
    process = checkout.start()
    try:
        until(lambda: what in checkout.called, f"{what} runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert checkout.called[-2:] == [what, "down"]
    finally:
        process.kill()
        process.communicate()


def test_two_runs_do_not_share_a_cluster(checkout: Checkout) -> None:
    """Else the end of the first would stop it under the second."""
    checkout.with_cluster()
    go = checkout.root.parent / "go"
    checkout.program(checkout.root / ".venv/bin/pytest", f"until [[ -e {go} ]]; do sleep 0.05; done")
    first, second = checkout.start(), None
    try:
        until(lambda: "pytest" in checkout.called, "the first one's tests run")
        second = checkout.start()
        assert second.stdout
        assert "another run uses it" in second.stdout.readline()
        assert checkout.called.count("up") == 1
        go.touch()
        assert (first.wait(60), second.wait(60)) == (0, 0)
        one = ["up", *["kubectl"] * 4, *["image"] * 5, *["pytest"] * len(SUITES), "down"]
        assert checkout.called == [*one, *one]
    finally:
        for p in filter(None, (first, second)):
            p.kill()
            p.communicate()


@pytest.mark.parametrize("how", ["time", "signal"])
def test_a_run_that_waits_for_another_ends_in_time_and_by_a_signal(checkout: Checkout, how: str) -> None:
    checkout.with_cluster()
    holder = subprocess.Popen(["flock", "--no-fork", str(checkout.state / "ci.lock"), "bash", "-c", "echo held; exec sleep 600"],
                              stdout=subprocess.PIPE, text=True)
    process = None
    try:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        process = checkout.start(902 if how == "time" else 4000)
        assert process.stdout
        assert "another run uses it" in process.stdout.readline()
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == (0 if how == "time" else 143)
        assert ("NOT TESTED on Kubernetes: another run used the cluster" in process.stdout.read()) is (how == "time")
        assert checkout.called == [], "it neither starts nor stops what is another's"
    finally:
        for p in filter(None, (process, holder)):
            p.kill()
            p.communicate()


def test_what_up_leaves_running_does_not_hold_the_lock(checkout: Checkout) -> None:
    pid = checkout.root.parent / "daemon"
    checkout.with_cluster(f"sleep 600 >/dev/null 2>&1 & echo $! >{pid}; echo export UP=1")
    try:
        assert checkout.run().returncode == 0
        assert subprocess.run(["flock", "--nonblock", str(checkout.state / "ci.lock"), "true"], check=False).returncode == 0
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_what_a_killed_run_left_is_removed_and_nothing_else(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.root.parent / "bin/kubectl", LEFT_BEHIND)
    assert checkout.run().returncode == 0
    changing = [c for c in checkout.commanded if c.startswith(("kubectl delete", "kubectl patch"))]
    assert changing == [
        "kubectl delete --ignore-not-found --wait=false clusterrole.rbac.authorization.k8s.io/hafnium-viewer-hafnium-test-0a1b2c"
        " validatingadmissionpolicy.admissionregistration.k8s.io/hafnium-records-hafnium-test-0a1b2c",
        "kubectl delete --ignore-not-found -f manifests/install.yaml", "kubectl delete --ignore-not-found namespace/risk",
        'kubectl patch -n hafnium-test-0a1b2c --type=merge -p {"metadata": {"finalizers": null}} modelrollout.hafnium.dev/held',
        "kubectl delete --ignore-not-found namespace/hafnium-test-0a1b2c",
    ]
    assert max(checkout.commanded.index(c) for c in changing) < next(
        i for i, c in enumerate(checkout.commanded) if c.startswith("pytest"))


def test_what_cannot_be_removed_is_said_and_the_tests_run(checkout: Checkout) -> None:
    checkout.with_cluster()
    checkout.program(checkout.root.parent / "bin/kubectl", "[[ $1 != delete ]] || exit 1\n" + LEFT_BEHIND)
    done = checkout.run()
    assert "what an earlier run left behind could not be removed" in done.stderr
    assert "pytest" in checkout.called


def test_in_a_cluster_that_ran_before_nothing_is_removed(checkout: Checkout) -> None:
    """It may be another's, and in use."""
    checkout.with_cluster()
    checkout.program(checkout.root.parent / "bin/kubectl", LEFT_BEHIND)
    named = subprocess.Popen(["bash", "-c", "read", str(checkout.state)], stdin=subprocess.PIPE)
    try:
        (checkout.state / "run/etcd.pid").write_text(f"{named.pid} 5510628\n")
        assert checkout.run().returncode == 0
        assert [c for c in checkout.commanded if c.startswith("kubectl")] == ["kubectl get --raw /readyz"]
    finally:
        named.kill()
        named.wait()
