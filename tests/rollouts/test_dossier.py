"""The report: complete, self-contained, nothing in it is markup that came from outside, and its sums can be checked."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hafnium_rollout_world import CANDIDATE, OTHER, STABLE, START, World, rollout

from hafnium_contract.evidence import EvidenceSpec, EvidenceValue, write_evidence
from hafnium_rollout import commands
from hafnium_rollout.dossier.facts import Facts, from_record, from_store
from hafnium_rollout.dossier.page import page
from hafnium_rollout.dossier.plots import ticks
from hafnium_rollout.errors import RecordError, UnknownRollout
from hafnium_rollout.objects import UserAction
from hafnium_rollout.observation import Observation
from hafnium_rollout.record import RecordLimits, RecordWriter, record_files
from hafnium_rollout.record_lines import rollout_data
from hafnium_rollout.state_folder import StateFolder
from hafnium_rollout.status import IDS_MAX
from hafnium_rollout.stores import FolderStore

EVIL = '<script>alert(1)</script><img src="https://evil.example/x">\'"&'
GATES = [
    {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.02}, "hardLimit": 0.3},
    {"name": "scores", "scores": {}}, {"name": "drift", "role": "Advisory", "drift": {}},
]


def finding(world: World, digest: str) -> EvidenceSpec:
    values = (EvidenceValue(name=EVIL, statistic="psi", value=0.31, threshold=0.1, p_value=1e-4, drifted=True),
              EvidenceValue(name="amount", statistic="psi", value=0.03, threshold=0.1))
    return EvidenceSpec(
        model_digest=digest, kind="drift", window_start=world.now, window_end=world.now + timedelta(seconds=1), verdict="Fail",
        samples=5000, values=values, message=f"geo moved {EVIL}", report="https://reports.example/1", created_at=world.now)


def run(folder: Path, *, bad: float = 0.01, turns: int = 150, limits: RecordLimits | None = None) -> World:
    """A run with a finding, a person's wish and a stranger, recorded."""
    world = World(rollout(gates=GATES, approvals={"required": ["risk", "security"]}), bad_stable=0.01, bad_candidate=0.01, rate=120)
    world.approvals = frozenset({"risk", "security"})
    writer, observe = RecordWriter(folder, limits), world.observe
    for i in range(turns):
        if i == 5:
            world.evidence = (finding(world, CANDIDATE),)
        if i == 20:
            world.actions = (UserAction(type="SkipStep", id="s1", candidate_digest=CANDIDATE, reason=f"CHG-1 {EVIL}", requested_by="ada"),)
        if i == 24 and world.route is not None:
            world.bad_candidate = bad
            world.route = replace(world.route, weight=max(world.route.weight - 1, 0), manager="user mallory")
        seen: list[Observation] = []
        world.observe = lambda s, seen=seen: seen.append(observe(s)) or seen[0]  # type: ignore[method-assign,func-returns-value]
        before = world.status
        decision = world.turn()
        writer.write(world.spec, before, seen[0], world.now, decision)
    return world


def recorded(writer: RecordWriter, world: World, turns: int) -> None:
    """Turns of the world, each written to the record."""
    observe = world.observe
    for _ in range(turns):
        seen: list[Observation] = []
        world.observe = lambda s, seen=seen: seen.append(observe(s)) or seen[0]  # type: ignore[method-assign,func-returns-value]
        before = world.status
        decision = world.turn()
        writer.write(world.spec, before, seen[0], world.now, decision)
    world.observe = observe  # type: ignore[method-assign]


DRIFT = [*GATES[:1], {"name": "drift", "role": "Safety", "drift": {}}]
STABLE_AGAIN = {"digest": STABLE, "version": "1", "storageUri": "file:///bundles/1"}


def failed_by_drift(writer: RecordWriter) -> World:
    """A job finds drift of model 2; it is taken back and rejected."""
    world = World(rollout(gates=DRIFT, approvals={"required": ["risk"]}), approvals=frozenset({"risk"}))
    recorded(writer, world, 8)
    world.evidence = (finding(world, CANDIDATE),)
    recorded(writer, world, 12)
    assert world.status.phase == "RolledBack"
    return world


def in_folder(state: Path, world: World) -> FolderStore:
    """What the controller leaves in a state folder whose record is there already."""
    folder = StateFolder(state)
    folder.objects.mkdir(parents=True)
    (state / "status").mkdir()
    folder.rollout("risk").write_text(yaml.safe_dump(rollout_data(world.spec)))
    folder.status("risk").write_text(world.status.model_dump_json())
    for e in world.evidence:
        write_evidence(folder.evidence, e)
    return FolderStore(state)


class Reader(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that don't match."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @classmethod
    def of(cls, text: str) -> Reader:
        reader = cls()
        reader.feed(text)
        reader.close()
        assert not reader._open
        return reader


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("record")
    assert run(folder, bad=0.05).status.phase == "RolledBack"
    return from_record(folder, START + timedelta(days=1))


def test_the_page_loads_nothing_and_runs_nothing(facts: Facts) -> None:
    found = Reader.of(page(facts))
    assert not {"script", "link", "img", "iframe", "object", "image", "a", "form", "use"} & set(found.tags)
    assert not [x for x in found.attributes if x[1] in ("src", "href", "xlink:href", "srcset", "action") or x[1].startswith("on")]
    assert not [x for x in found.attributes if "url(" in x[2] or x[2].startswith(("http", "//", "data:"))]
    style = re.search(r"<style>(.*?)</style>", page(facts), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_text_from_outside_is_text(facts: Facts) -> None:
    found = Reader.of(page(facts))
    assert EVIL in found.text
    assert "script" not in found.tags


def test_it_says_what_was_decided_and_on_what(facts: Facts) -> None:
    text = Reader.of(page(facts)).text
    assert re.search(r"Model 2 \(sha256:aaaaaaaaaaaa\) was taken back after .*GateFailed: Safety gate errors", text)
    for part in (CANDIDATE, STABLE, "file:///bundles/2", "SkipStep", "ada", "user mallory changed the route", "All are given",
                 "drift", "0.31", "recorded turns were decided again: every decision was found again", "hardLimit: 0.3", facts.sha256):
        assert part in text, part
    assert text.count("StepEntered") >= 2
    assert page(facts).count("<svg") >= 4


def test_the_sums_can_be_checked_by_who_has_the_inputs(tmp_path: Path) -> None:
    run(tmp_path)
    found = from_record(tmp_path, START)
    sums = {s.name: s.sha256 for s in found.sources}
    record = record_files(tmp_path)[0]
    assert sums[record.name] == hashlib.sha256(record.read_bytes()).hexdigest()
    text = json.dumps(rollout_data(found.rollout), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert sums["modelrollout.json"] == hashlib.sha256(text.encode()).hexdigest()
    listing = "".join(f"{s.sha256}  {s.name}\n" for s in found.sources)
    assert found.sha256 == hashlib.sha256(listing.encode()).hexdigest()
    record.write_bytes(record.read_bytes() + b"\n")
    assert from_record(tmp_path, START).sha256 != found.sha256


def test_the_same_facts_give_the_same_page_and_the_spec_can_be_read_back(facts: Facts) -> None:
    assert page(facts) == page(facts)
    text = Reader.of(page(facts)).text
    shown = text[text.index("apiVersion: hafnium.dev"):text.index("Inputs")]
    assert yaml.safe_load(shown) == rollout_data(facts.rollout)


@pytest.mark.parametrize(("turns", "words"), [
    (2, "is under way: Pending"), (8, "is under way at step 0, in shadow"), (150, "was promoted after")])
def test_a_report_can_be_made_at_any_time(tmp_path: Path, turns: int, words: str) -> None:
    run(tmp_path, turns=turns)
    assert words in Reader.of(commands.report_of_record(tmp_path, now=START)).text


def test_a_record_with_a_queued_model_tells_the_approvals_of_the_one_under_way(tmp_path: Path) -> None:
    first, queued = (rollout(approvals={"required": ["security"]}, strategy={"onNewCandidate": "Queue"}, model={"digest": d})
                     for d in (CANDIDATE, OTHER))
    world = World(first)
    world.approvals = frozenset({"security"})
    writer, observe = RecordWriter(tmp_path), world.observe
    for i in range(12):
        world.spec = queued if i >= 6 else world.spec
        seen: list[Observation] = []
        world.observe = lambda s, seen=seen: seen.append(observe(s)) or seen[0]  # type: ignore[method-assign,func-returns-value]
        before = world.status
        decision = world.turn()
        writer.write(world.spec, before, seen[0], world.now, decision)
    text = Reader.of(commands.report_of_record(tmp_path, now=START)).text
    assert f"Approvals are of {CANDIDATE}, trained by thea. Required: security. All are given." in text
    assert f"The ModelRollout asks for {OTHER} next" in text


@pytest.mark.parametrize("source", ["state folder", "record"])
def test_a_model_that_was_taken_back_stays_the_last_run_when_the_stable_one_is_asked_for_again(tmp_path: Path, source: str) -> None:
    """`git revert`: the page about the failed run is the one that the risk officer needs now."""
    writer = RecordWriter(StateFolder(tmp_path).record("risk"))
    world = failed_by_drift(writer)
    world.spec = rollout(gates=DRIFT, approvals={"required": ["risk"]}, model=STABLE_AGAIN)
    recorded(writer, world, 3)
    assert world.events.count("StableAskedAgain") == 1
    assert (world.status.phase, world.status.weight) == ("Promoted", 100)
    store = in_folder(tmp_path, world)
    found = from_store(store, "risk", START) if source == "state folder" else from_record(StateFolder(tmp_path).record("risk"), START)
    assert {p.weight for p in found.history} == {0}, "no plot shows the failed model at 100 %"
    text = Reader.of(page(found)).text
    assert re.search(r"Model 1 \(sha256:bbbbbbbbbbbb\) is in production; the last run, of Model 2 \(sha256:aaaaaaaaaaaa\), was taken back "
                     r"after \d+s\. GateFailed: Safety gate drift", text)
    approved = "All are given" if source == "record" else "Missing: risk"
    for part in ("Rollout of risk 2", "1 findings", "geo moved", f"Approvals are of {CANDIDATE}", approved):
        assert part in text, part
    assert "was promoted" not in text
    assert "next: approvals of that one" not in text


def test_a_rejected_model_that_is_asked_for_again_is_not_taken_for_the_one_in_production(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    world = failed_by_drift(writer)
    world.spec, world.candidate_digest = rollout(model={"digest": OTHER, "version": "3"}), OTHER
    recorded(writer, world, 150)
    world.spec = rollout(gates=DRIFT)
    recorded(writer, world, 3)
    text = Reader.of(commands.report_of_record(tmp_path, now=START)).text
    assert "Model 3 (sha256:cccccccccccc) was promoted after" in text
    assert "was taken back" not in text


def test_status_shows_no_weight_for_a_candidate_that_goes_back(tmp_path: Path) -> None:
    """It takes a while here, since somebody asks it past the gateway."""
    world = World(stray=3)
    world.until_step(2)
    world.bad_candidate = 0.5
    while world.status.rollback is None:
        world.turn()
    for _ in range(3):
        world.turn()
    assert world.status.step is not None
    in_folder(tmp_path, world)
    row = commands.status(tmp_path, "risk")["rollouts"][0]
    assert (row["weight"], row["weightObserved"]) == (0, 0)
    assert commands.status_table(tmp_path, "risk").splitlines()[1].split()[:4] == ["risk", "Progressing", str(row["step"]), "0%"]


@pytest.mark.parametrize("source", ["state folder", "record"])
def test_a_finding_that_was_removed_since_is_still_in_the_report_of_the_run(tmp_path: Path, source: str) -> None:
    record = StateFolder(tmp_path).record("risk")
    writer = RecordWriter(record)
    world = failed_by_drift(writer)
    world.evidence = (finding(world, STABLE),)
    world.actions = (UserAction(type="Promote", id="p1", candidate_digest=CANDIDATE),)
    recorded(writer, world, 1)
    world.evidence = ()
    store = in_folder(tmp_path, world)
    found = from_store(store, "risk", START) if source == "state folder" else from_record(record, START)
    assert [e.model_digest for e in found.evidence] == [CANDIDATE, STABLE]
    world.spec, world.candidate_digest = rollout(gates=DRIFT, model={"digest": OTHER, "version": "3"}), OTHER
    recorded(writer, world, 3)
    assert [e.model_digest for e in from_record(record, START).evidence] == [], "what an earlier run saw is that run's"


def test_a_wish_that_the_status_has_forgotten_was_acted_on_all_the_same(tmp_path: Path) -> None:
    world, writer = World(), RecordWriter(tmp_path)
    for i in range(IDS_MAX + 6):
        world.actions = (UserAction(type="Retry", id=f"wish{i}", candidate_digest=CANDIDATE),)
        recorded(writer, world, 1)
    assert "wish0" not in world.status.handled_actions
    assert "wish0" in page(from_record(tmp_path, START))
    assert "not acted on" not in page(from_record(tmp_path, START))


def test_watch_of_a_model_that_is_asked_for_again_tells_nothing_of_the_one_that_was_taken_back(tmp_path: Path) -> None:
    world = failed_by_drift(RecordWriter(tmp_path / "record"))
    world.spec = rollout(gates=DRIFT, model=STABLE_AGAIN)
    world.turn()
    state = tmp_path / "state"
    in_folder(state, world)
    assert [p.event for p in commands.watch(state, "risk", pytest.fail)] == ["StableAskedAgain"]


def test_a_changed_record_is_named_in_the_report(tmp_path: Path) -> None:
    run(tmp_path)
    path = record_files(tmp_path)[0]
    path.write_text(re.sub(r'"candidate":\{"bad":\d+\.0', '"candidate":{"bad":0.0', path.read_text()))
    assert "do NOT end as recorded" in Reader.of(commands.report_of_record(tmp_path, now=START)).text


def test_of_a_state_folder_with_approvals_findings_and_only_the_last_runs_record(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir(parents=True)
    (tmp_path / "status").mkdir()
    world = run(folder.record("risk"), limits=RecordLimits(file_bytes_max=20_000))
    folder.rollout("risk").write_text(yaml.safe_dump(rollout_data(world.spec)))
    folder.status("risk").write_text(world.status.model_dump_json())
    write_evidence(folder.evidence, finding(world, STABLE))
    commands.approve(tmp_path, "risk", "security", "grace <g@x>")
    found = from_store(FolderStore(tmp_path), "risk", START)
    assert found.status == world.status
    assert len([s for s in found.sources if ".jsonl" in s.name]) > 1
    text = Reader.of(page(found)).text
    for part in ("grace <g@x>", "Missing: risk.", "every decision was found again", "stable before"):
        assert part in text, part
    with pytest.raises(UnknownRollout):
        commands.report(tmp_path, "absent")
    with pytest.raises(RecordError):
        commands.report_of_record(tmp_path / "absent")


def test_a_rollout_without_a_record_says_so(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir(parents=True)
    folder.rollout("risk").write_text(yaml.safe_dump(rollout_data(rollout())))
    text = Reader.of(commands.report(tmp_path, "risk", now=START)).text
    assert "there is no record of the turns, so nothing was replayed" in text
    assert "Nothing was seen yet" in text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.013, 0.087), (0, 123456), (5, 5), (0, 1e-9)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
