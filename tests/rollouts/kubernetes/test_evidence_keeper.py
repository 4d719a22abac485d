"""Evidence is understood once, held while somebody looks at it, and removed when nobody needs it: written down first, by the leader."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_operator import until
from hafnium_scripted_api import Answer, Asked, ScriptedApi, data, says, scripted_api
from hafnium_small_api import SmallApi, small_api
from prometheus_client.parser import text_string_to_metric_families

from hafnium_contract.evidence import EvidenceSpec
from hafnium_rollout.evidence_retention import Asked as AskedFor
from hafnium_rollout.evidence_retention import Retention, Stored
from hafnium_rollout.kubernetes.errors import LeaseLost, Unavailable, Unreadable
from hafnium_rollout.kubernetes.evidence_cache import EvidenceCache
from hafnium_rollout.kubernetes.evidence_keeper import EvidenceKeeper
from hafnium_rollout.kubernetes.kinds import MODEL_EVIDENCE, MODEL_ROLLOUT, Json
from hafnium_rollout.kubernetes.metrics import Metrics
from hafnium_rollout.kubernetes.operator import Operator, utc_now
from hafnium_rollout.kubernetes.settings import Settings
from hafnium_rollout.kubernetes.watches import Watches
from hafnium_rollout.record import RecordFiles, RecordLimits, record_files
from hafnium_rollout.record_lines import Lines

NOW = utc_now().replace(microsecond=0)
HOUR = timedelta(hours=1)
MODEL, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def evidence(hours_ago: int, digest: str = MODEL, namespace: str = "risk", verdict: str = "Pass") -> Json:
    end = NOW - hours_ago * HOUR
    name = f"drift-{digest[7:15]}-{hours_ago:05d}"
    return {"metadata": {"namespace": namespace, "name": name, "creationTimestamp": end.isoformat(), "uid": f"u-{namespace}-{name}",
                         "resourceVersion": "1"},
            "spec": {"modelDigest": digest, "kind": "drift", "windowStart": (end - HOUR).isoformat(), "windowEnd": end.isoformat(),
                     "verdict": verdict, "samples": hours_ago, "message": f"{hours_ago} hours ago", "createdAt": end.isoformat(),
                     "values": [{"name": "amount", "statistic": "psi", "value": 0.01}], "job": "hafnium-drift"}}


def rollout(name: str = "risk", digest: str = MODEL, namespace: str = "risk", max_age: str = "24h") -> Json:
    spec = {"model": {"name": "risk", "version": "1", "storageUri": "s3://b/x", "digest": digest}, "service": {"predictor": {}},
            "strategy": {"steps": [{"weight": 100}]}, "gates": [
                {"name": "errors", "role": "Safety", "requests": {}, "compare": {"margin": 0.01}},
                {"name": "drift", "role": "Quality", "drift": {"maxAge": max_age}}]}
    return {"apiVersion": "hafnium.dev/v1alpha1", "kind": "ModelRollout", "metadata": {"namespace": namespace, "name": name}, "spec": spec}


@dataclass
class Desk:
    """A keeper, and what it said and did."""

    api: SmallApi
    door: ScriptedApi
    folder: Path
    leads: bool = True
    said: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    metrics: Metrics = field(default_factory=lambda: Metrics(utc_now))

    def keeper(self, *, record: bool = True, **settings: Any) -> EvidenceKeeper:
        def fence() -> None:
            if not self.leads:
                raise LeaseLost("another leads")
        given = Settings(data_folder=self.folder if record else None, **settings)
        return EvidenceKeeper(self.door.client().fenced(fence), given, self.said.append, self.metrics, lambda: NOW)

    def put(self, items: Iterable[Json]) -> None:
        for item in items:
            self.api.put(MODEL_EVIDENCE, item)

    def look(self, keeper: EvidenceKeeper, *rollouts: Json) -> tuple[Retention, tuple[Stored, ...]]:
        """As a turn does: what rollouts ask for, what there is, what of it nobody needs."""
        retention = keeper.asked(rollouts or (rollout(),))
        keeper.cache.read(self.door.client(), "", retention)
        return retention, retention.surplus(keeper.cache.found)

    @property
    def there(self) -> list[int]:
        return sorted(i["spec"]["samples"] for k, i in self.api.objects.items() if k[0] == MODEL_EVIDENCE.plural)

    def recorded(self, namespace: str = "risk") -> list[Json]:
        files = sorted((self.folder / "evidence" / namespace).glob("*.jsonl*"))
        texts = [gzip.decompress(f.read_bytes()).decode() if f.name.endswith(".gz") else f.read_text(encoding="utf-8") for f in files]
        return [json.loads(line) for text in texts for line in text.splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [x for x in self.said if x["event"] == name]

    def count(self, metric: str) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(self.metrics.exposition().decode())
        return {tuple(s.labels.values()): s.value for f in families for s in f.samples if s.name == metric}


@contextmanager
def desk(folder: Path) -> Generator[Desk]:
    with small_api() as (api, door):
        yield Desk(api, door, folder)


# --- removing -----------------------------------------------------------------------------------------------------------------


def test_what_nobody_needs_is_written_down_whole_and_then_removed(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in range(60))
        at_delete: list[int] = []
        d.api.before = lambda asked: at_delete.append(len(d.recorded())) if asked.method == "DELETE" else None
        keeper = d.keeper()
        _, surplus = d.look(keeper)
        keeper.remove(surplus)
        assert d.there == list(range(26))
        assert [line["spec"]["samples"] for line in d.recorded()] == list(range(59, 25, -1)), "oldest first, each once"
        assert all(n > i for i, n in enumerate(at_delete)), "on the disk before it is deleted"
        first = d.recorded()[0]
        assert first["spec"] == evidence(59)["spec"]
        assert first["metadata"]["name"] == "drift-aaaaaaaa-00059"
        assert d.count("modelrollout_evidence_removed_total") == {("risk",): 34.0}
        line = d.events("EvidenceRemoved")[0]
        assert (line["evidence"], line["verdict"], line["modelDigest"], line["message"]) == (
            "risk/drift-aaaaaaaa-00059", "Pass", MODEL, "59 hours ago")
        assert line["windowEnd"] == (NOW - 59 * HOUR).isoformat()


def test_without_a_data_folder_the_log_has_it_before_it_is_gone(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in (1, 40, 50))
        told: list[int] = []
        d.api.before = lambda asked: told.append(len(d.events("EvidenceRemoved"))) if asked.method == "DELETE" else None
        keeper = d.keeper(record=False, evidence_kept=20)
        keeper.remove(d.look(keeper, rollout(digest=OTHER))[1])
        assert d.there == [1]
        assert told == [2, 2]
        assert not (tmp_path / "evidence").exists()


def test_some_at_a_time_and_the_oldest_first(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in range(60))
        keeper = d.keeper(evidence_removals_max=5)
        keeper.start()
        for left in (55, 50):
            retention, _ = d.look(keeper)
            keeper.tidy(retention)
            until(lambda left=left: len(d.there) == left, f"{left} are left", every_s=0.01)
        assert d.there == list(range(50))
        assert d.count("modelrollout_evidences") == {("risk",): 55.0}
        assert d.count("modelrollout_evidence_surplus") == {("risk",): 29.0}
        keeper.stop()


def test_zero_at_a_time_removes_nothing(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in range(40))
        keeper = d.keeper(evidence_removals_max=0)
        keeper.start()
        keeper.tidy(d.look(keeper)[0])
        keeper.stop()
        assert len(d.there) == 40
        assert d.count("modelrollout_evidence_surplus") == {("risk",): 14.0}


def test_what_is_refused_is_counted_and_said_once_and_recorded_once(tmp_path: Path) -> None:
    """An operator whose role is older: it goes on, and begins to remove when it may."""
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in (1, 40, 50))
        d.api.before = lambda asked: says(403, "cannot delete resource") if asked.method == "DELETE" else None
        keeper = d.keeper()
        surplus = d.look(keeper, rollout(digest=OTHER))[1]
        for _ in range(3):
            keeper.remove(surplus)
        assert d.there == [1, 40, 50]
        assert d.count("modelrollout_evidence_removal_errors_total") == {("Forbidden",): 3.0}
        assert ["cannot delete resource" in x["message"] for x in d.events("EvidenceNotRemoved")] == [True]
        d.api.before = lambda _: None
        keeper.remove(surplus)
        assert d.there == [1]
        assert [x["spec"]["samples"] for x in d.recorded()] == [50, 40]


def test_an_api_server_in_trouble_is_not_asked_twice(tmp_path: Path) -> None:
    """Its retries are for what guards a candidate."""
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in (40, 50))
        keeper = d.keeper()
        surplus = d.look(keeper, rollout(digest=OTHER))[1]
        calls: list[Asked] = []

        def busy(asked: Asked) -> Answer:
            calls.append(asked)
            return says(503, "busy")
        d.api.before = busy
        keeper.remove(surplus)
        assert len(calls) == 1
        assert d.count("modelrollout_evidence_removal_errors_total") == {("Unavailable",): 1.0}


@pytest.mark.parametrize("status", [404, 409])
def test_one_that_somebody_else_removed_or_touched_holds_up_no_other(tmp_path: Path, status: int) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in (40, 50))
        d.api.before = lambda asked: says(status, "no") if asked.method == "DELETE" and asked.path.endswith("50") else None
        keeper = d.keeper()
        keeper.remove(d.look(keeper, rollout(digest=OTHER))[1])
        assert d.there == [50]
        assert d.events("EvidenceNotRemoved") == []


def test_another_object_of_the_same_name_stays(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(50)])
        keeper = d.keeper()
        surplus = d.look(keeper, rollout(digest=OTHER))[1]
        for item in d.api.objects.values():
            item["metadata"]["uid"] = "another"
        keeper.remove(surplus)
        assert d.there == [50]
        assert d.recorded() == []


def test_who_does_not_lead_writes_and_removes_nothing(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(50)])
        keeper = d.keeper()
        surplus = d.look(keeper, rollout(digest=OTHER))[1]
        d.leads = False
        with pytest.raises(LeaseLost):
            keeper.remove(surplus)
        assert (d.there, d.recorded(), d.events("EvidenceRemoved")) == ([50], [], [])


def test_what_cannot_be_written_down_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "evidence").write_text("no folder")
    with desk(tmp_path) as d:
        d.put([evidence(50)])
        keeper = d.keeper()
        keeper.remove(d.look(keeper, rollout(digest=OTHER))[1])
        assert d.there == [50]
        assert len(d.events("EvidenceNotRemoved")) == 1
        assert sum(d.count("modelrollout_evidence_removal_errors_total").values()) == 1.0


def test_nothing_goes_where_a_model_rollout_cannot_be_understood(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(50), evidence(51, namespace="other")])
        keeper = d.keeper()
        keeper.start()
        for _ in range(2):
            keeper.tidy(d.look(keeper, rollout(digest=OTHER, max_age="soon"), rollout(digest=OTHER, namespace="other"))[0])
        until(lambda: d.there == [50], "the other namespace's", every_s=0.01)
        keeper.stop()
        assert [x["message"][:28] for x in d.events("EvidenceNotRemoved")] == ["nothing is removed in risk: "]


def test_a_turn_decides_first_and_removes_then(tmp_path: Path) -> None:
    """The whole loop: the leader's turn writes the statuses, and what is old goes after that, while turns go on."""
    with small_api() as (api, door):
        for h in range(40):
            api.put(MODEL_EVIDENCE, evidence(h))
        api.put(MODEL_ROLLOUT, rollout())
        given = Settings(watch=False, data_folder=tmp_path, threads=1, evidence_removals_max=4, lease_duration_s=600,
                         lease_renew_deadline_s=500)
        operator = Operator(given, door.client(), log=lambda _: None)
        assert operator.leader.step()
        operator._evidence.start()
        api.writes.clear()
        operator.full_turn()
        until(lambda: api.writes.count("DELETE modelevidences") == 4, "the first four", every_s=0.01)
        assert api.writes.index("PATCH modelrollouts/status") < api.writes.index("DELETE modelevidences")
        left = lambda: sum(k[0] == MODEL_EVIDENCE.plural for k in api.objects)  # noqa: E731
        until(lambda: operator.full_turn() and left() == 25, "only what is kept is left", every_s=0.05)
        operator.full_turn()
        assert "modelrollout_evidence_surplus{namespace=\"risk\"} 0.0" in operator.metrics.exposition().decode()
        operator._evidence.stop()


# --- reading ------------------------------------------------------------------------------------------------------------------


def _needs(*digests: str) -> Retention:
    return Retention({"risk": [AskedFor(frozenset(digests))]}, NOW, 20)


def test_a_finding_is_understood_once_and_forgotten_when_it_is_gone(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put(evidence(h) for h in (1, 2))
        cache = EvidenceCache()
        first = cache.read(d.door.client(), "")["risk"].about([MODEL])
        again = cache.read(d.door.client(), "")["risk"].about([MODEL])
        assert len(first) == 2
        assert all(a is b for a, b in zip(first, again, strict=True))
        del d.api.objects[MODEL_EVIDENCE.plural, "risk", "drift-aaaaaaaa-00001"]
        assert [e.samples for e in cache.read(d.door.client(), "")["risk"].about([MODEL])] == [2]
        assert [s.name for s in cache.found] == ["drift-aaaaaaaa-00002"]


def test_a_new_object_of_an_old_name_is_understood_anew(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(1)])
        cache = EvidenceCache()
        cache.read(d.door.client(), "")
        d.put([evidence(1, verdict="Fail")])
        assert [e.verdict for e in cache.read(d.door.client(), "")["risk"].about([MODEL])] == ["Fail"]


def test_a_look_at_one_namespace_keeps_what_is_known_of_the_others(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(1), evidence(2, namespace="other")])
        cache = EvidenceCache()
        kept = cache.read(d.door.client(), "")["other"].about([MODEL])[0]
        assert set(cache.read(d.door.client(), "risk")) == {"risk"}
        assert cache.read(d.door.client(), "")["other"].about([MODEL])[0] is kept


def test_only_what_somebody_looks_at_is_held_and_whoever_looks_later_sees_it_all(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(1), evidence(2, OTHER), evidence(300, OTHER, verdict="Fail")])
        cache = EvidenceCache()
        assert list(cache.read(d.door.client(), "", _needs(MODEL))["risk"].by_model) == [MODEL]
        cache.let_go(_needs(MODEL).surplus(cache.found))
        asks = Retention({"risk": [AskedFor(frozenset({OTHER}), (("drift", 400 * HOUR),))]}, NOW, 20)
        assert {e.verdict for e in cache.read(d.door.client(), "risk", asks)["risk"].about([OTHER])} == {"Pass", "Fail"}


def test_one_that_cannot_be_read_is_told_to_all_that_it_may_be_about(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        broken = evidence(1)
        broken["spec"] = {"kind": "drift"}
        d.put([broken])
        (unread,) = EvidenceCache().read(d.door.client(), "", _needs(OTHER))["risk"].unread
        assert unread.kind == "drift"


def _paged(count: int) -> Callable[[Asked], Answer]:
    def answer(asked: Asked) -> Answer:
        at = int(asked.path.partition("continue=")[2] or 0)
        more = {"continue": str(at + 2)} if at + 2 < count else {}
        return data({"metadata": {"resourceVersion": "7", **more}, "items": [evidence(h) for h in range(at, min(at + 2, count))]})
    return answer


def test_a_list_that_is_too_long_is_refused_and_still_removed_from() -> None:
    """Or the operator could never get out of it."""
    with scripted_api(_paged(90)) as api:
        cache = EvidenceCache(listed_max=80)
        with pytest.raises(Unreadable, match="more than 80 objects"):
            cache.read(api.client(), "", _needs(MODEL))
        assert len(cache.found) == 80
        assert len(_needs(MODEL).surplus(cache.found)) == 80 - 26


def test_more_than_there_is_room_for_is_refused_until_the_surplus_is_let_go() -> None:
    with scripted_api(_paged(90)) as api:
        cache = EvidenceCache(held_max=30)
        with pytest.raises(Unreadable, match="all that there is room for"):
            cache.read(api.client(), "", _needs(MODEL))
        cache.let_go(_needs(MODEL).surplus(cache.found))
        assert len(cache.read(api.client(), "", _needs(MODEL))["risk"].about([MODEL])) == 26


def test_a_list_that_breaks_off_costs_nothing_of_what_is_known(tmp_path: Path) -> None:
    with desk(tmp_path) as d:
        d.put([evidence(1)])
        cache = EvidenceCache()
        before = cache.read(d.door.client(), "")["risk"].about([MODEL])[0]
        d.api.before = lambda _: says(503, "busy")
        with pytest.raises(Unavailable):
            cache.read(d.door.client(sleep=lambda _: None), "")
        d.api.before = lambda _: None
        found = cache.read(d.door.client(), "")["risk"].about([MODEL])[0]
        assert found is before
        assert isinstance(found, EvidenceSpec)


# --- watching -----------------------------------------------------------------------------------------------------------------


def test_removing_wakes_nobody_and_new_evidence_does() -> None:
    lines = [{"type": t, "object": {"metadata": {"namespace": "risk", "name": t.lower(), "resourceVersion": "8"}}}
             for t in ("DELETED", "ADDED")]
    stop, called = threading.Event(), list[Any]()

    def answer(asked: Asked) -> Answer:
        if "watch=1" not in asked.path:
            return data({"metadata": {"resourceVersion": "7"}, "items": []})
        return Answer(200, b"".join(json.dumps(x).encode() + b"\n" for x in lines))

    def call(key: Any) -> None:
        called.append(key)
        stop.set()
    with scripted_api(answer) as api:
        Watches(api.client(), "", call, stop, lambda *_: None)._run(MODEL_EVIDENCE)
        assert called == [("risk", "*")]
        assert "limit=1" in api.asked[0].path, "where to begin is asked without reading everything"


class PowerCuts:
    """What a power cut may leave at worst: of a file what was synced last, of a folder the names that were, without those removed since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, set[str]] = {}
        self._open: list[int] = []
        """So that no file gets the number of one that was removed."""
        sync = os.fsync

        def fsync(fd: int) -> None:
            sync(fd)
            self._open.append(os.dup(fd))
            of = Path(f"/proc/self/fd/{fd}").resolve()
            if of.is_dir():
                self._names[of.stat().st_ino] = {f.name for f in of.iterdir()}
            else:
                self._bytes[of.stat().st_ino] = of.read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    def left(self) -> list[int]:
        """Numbers of the lines that can be read after one."""
        for found in (self._folder, *self._folder.parents[:2]):
            if found.name not in self._names.get(found.parent.stat().st_ino, ()):
                return []
        after = self._folder.parent / "after"
        shutil.rmtree(after, ignore_errors=True)
        after.mkdir()
        for file in self._folder.iterdir():
            if file.name in self._names.get(self._folder.stat().st_ino, ()):
                (after / file.name).write_bytes(self._bytes.get(file.stat().st_ino, b""))
        text = b"".join(gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in record_files(after))
        return [json.loads(x)["number"] for x in text.splitlines()]

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)


def test_a_power_cut_costs_nothing_that_was_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after its file was finished and compressed: by then the API server's copy is long gone."""
    folder = tmp_path / "volume" / "evidence" / "ns"
    (tmp_path / "volume").mkdir()
    cuts = PowerCuts(monkeypatch, folder)
    cuts._names[tmp_path.stat().st_ino] = {"volume"}
    lines: list[int] = []
    unlink = Path.unlink

    def unlinked(file: Path, missing_ok: bool = False) -> None:
        unlink(file, missing_ok)
        if file.parent == folder:
            assert cuts.left() == lines, f"{file.name} was removed too early"

    monkeypatch.setattr(Path, "unlink", unlinked)
    try:
        for i in range(20):
            line = json.dumps({"number": i, "text": "x" * 200}) + "\n"
            files = RecordFiles(folder, RecordLimits(file_bytes_max=1_000), durable=True)  # as the keeper does: anew each time
            files.append(Lines(line.encode(), begins=True))
            lines.append(i)
            assert cuts.left() == lines
    finally:
        cuts.close()
    assert len(record_files(folder)) > 3
