"""The replay: fixed rate, nothing forgotten, a kill costs nothing."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hafnium_contract.errors import InputError
from hafnium_local.replay import again_and_again, identified, main, read_requests, replay


def rows(count: int) -> list[dict[str, Any]]:
    return [{"request_id": f"q{i}", "features": {"i": i}} for i in range(count)]


async def test_all_are_answered_once_and_counted_by_version(backend: Any, tmp_path: Path) -> None:
    server = backend("--version", "7")
    found = await replay(rows(60), server.url, rate_per_s=500, workers=8, journal=tmp_path / "j")
    assert (found.answered, found.ok, found.lost, found.retries, found.finished) == (60, 60, 0, 0, True)
    assert found.by_version == {"7": 60}
    assert found.p50_ms is not None and found.max_ms is not None and found.p50_ms <= found.max_ms  # noqa: PT018
    assert sorted(s["id"] for s in server.seen()) == sorted(f"q{i}" for i in range(60))


async def test_second_run_goes_on_where_the_first_stopped(backend: Any, tmp_path: Path) -> None:
    server = backend()
    first = await replay(rows(30), server.url, rate_per_s=500, workers=4, journal=tmp_path / "j", limit=10)
    assert (first.answered, first.finished) == (10, False)
    second = await replay(rows(30), server.url, rate_per_s=500, workers=4, journal=tmp_path / "j")
    assert (second.answered, second.resumed, second.finished) == (30, 10, True)
    assert len(server.seen()) == 30


async def test_journal_that_was_cut_in_the_middle_of_a_line_resends_that_request(backend: Any, tmp_path: Path) -> None:
    server = backend()
    await replay(rows(3), server.url, rate_per_s=500, workers=1, journal=tmp_path / "j")
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:-4])
    found = await replay(rows(3), server.url, rate_per_s=500, workers=1, journal=tmp_path / "j")
    assert (found.answered, found.resumed) == (3, 2)
    assert (tmp_path / "j").read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(("status", "field"), [(422, "refused"), (429, "refused"), (500, "failed")])
async def test_answers_that_are_no_scores_are_counted_and_not_sent_again(backend: Any, tmp_path: Path, status: int, field: str) -> None:
    server = backend("--status", str(status))
    found = await replay(rows(5), server.url, rate_per_s=500, workers=2, journal=tmp_path / "j")
    assert (found.as_json()[field], found.answered, found.retries, found.lost) == (5, 5, 0, 0)
    assert f"status {status}" in found.last_error


async def test_server_that_comes_late_loses_nothing(backend: Any, tools: Any, tmp_path: Path) -> None:
    port = tools.free_port()
    late = threading.Timer(0.5, lambda: backend("--version", "1", port=port))
    late.start()
    found = await replay(rows(20), f"http://127.0.0.1:{port}", rate_per_s=500, workers=20, journal=tmp_path / "j")
    late.join()
    assert (found.ok, found.lost) == (20, 0)
    assert found.retries == found.attempts - 20 > 0


async def test_what_a_stall_held_up_does_not_come_all_at_once(backend: Any, tools: Any, tmp_path: Path) -> None:
    port = tools.free_port()
    servers: list[Any] = []
    late = threading.Timer(1.0, lambda: servers.append(backend(port=port)))
    late.start()
    await replay(rows(150), f"http://127.0.0.1:{port}", rate_per_s=100, workers=10, journal=tmp_path / "j")
    late.join()
    times = sorted(s["time"] for s in servers[0].seen())[20:]
    assert all(b - a > 0.5 for a, b in zip(times, times[100:], strict=False)), "100 requests within half a second"


async def test_request_without_an_answer_until_the_deadline_is_lost_and_tried_by_the_next_run(
    backend: Any, tools: Any, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{tools.free_port()}"
    found = await replay(rows(3), url, rate_per_s=500, workers=3, journal=tmp_path / "j", deadline_s=0.3)
    assert (found.lost, found.answered, found.retries > 0) == (3, 0, True)
    assert "Connect" in found.last_error
    assert (await replay(rows(3), backend().url, rate_per_s=500, workers=3, journal=tmp_path / "j")).ok == 3


async def test_503_is_no_answer(backend: Any, tmp_path: Path) -> None:
    server = backend("--status", "503")
    found = await replay(rows(2), server.url, rate_per_s=500, workers=2, journal=tmp_path / "j", deadline_s=0.3)
    assert (found.lost, found.last_error) == (2, "status 503")


async def test_stop_file_and_event_end_it(backend: Any, tmp_path: Path) -> None:
    server = backend()

    def endless() -> Iterator[dict[str, Any]]:
        for i in range(10**9):
            if i == 20:
                (tmp_path / "stop").write_text("")
            yield {"features": {"i": i}}

    found = await replay(endless(), server.url, rate_per_s=200, workers=2, journal=tmp_path / "j", stop=tmp_path / "stop")
    assert not found.finished
    assert found.answered == len(server.seen()) >= 20
    event = threading.Event()
    event.set()
    assert (await replay(endless(), server.url, rate_per_s=200, workers=2, journal=tmp_path / "k", stop=event)).attempts == 0


async def test_duration_ends_it(backend: Any, tmp_path: Path) -> None:
    many = ({"features": {"i": i}} for i in range(10**9))
    found = await replay(many, backend().url, rate_per_s=50, workers=2, journal=tmp_path / "j", duration_s=0.3)
    assert 0 < found.answered <= 20


def test_killed_replay_goes_on_and_every_request_is_answered(backend: Any, tools: Any, tmp_path: Path) -> None:
    server = backend("--version", "1")
    file, journal, summary = tmp_path / "requests.jsonl", tmp_path / "j", tmp_path / "summary.json"
    file.write_text("".join(json.dumps({"features": {"i": i}}) + "\n" for i in range(300)))
    argv = [
        sys.executable, "-m", "hafnium_local.replay", "--requests", str(file), "--url", server.url, "--rate", "150", "--journal",
        str(journal), "--summary", str(summary),
    ]
    first = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    tools.eventually(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 20, "some answered")
    first.kill()
    first.wait()
    second = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    tools.eventually(lambda: journal.read_bytes().count(b"\n") > 100, "more answered")
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == 0
    stopped = json.loads(summary.read_text())
    assert not stopped["finished"]
    assert stopped["unanswered"] == stopped["lost"] == 0
    assert stopped["answered"] == journal.read_bytes().count(b"\n")
    last = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(last.stdout)
    assert (found["answered"], found["finished"], found["by_version"]) == (300, True, {"1": 300})
    assert {s["id"] for s in server.seen()} == {f"replay-{i:09d}" for i in range(300)}


def test_again_gives_the_same_requests_under_ids_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"request_id": "a"}\n{"features": {}}\n')
    found = [r for r, _ in zip(identified(again_and_again(file)), range(5), strict=False)]
    assert [name for name, _ in found] == ["a", "replay-000000001", "a-lap1", "replay-000000001-lap1", "a-lap2"]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="holds no request"):
        next(again_and_again(tmp_path / "empty.jsonl"))


def test_ids_are_stable_and_plain() -> None:
    found = list(identified([{"features": {}}, *({"request_id": i} for i in ("a\tb", "", " ", "\0b\ud800"))]))
    assert [i for i, _ in found] == ["replay-000000000", "a b", "replay-000000002", "replay-000000003", "b"]
    assert all(r["request_id"] == i for i, r in found)


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": 1}\n{', ":2: not JSON"), ("[1]\n", ":1: expected a score request"), ('"' + "x" * 1_100_000, ":1: longer than"),
], ids=["json", "list", "long"])
def test_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_requests(tmp_path / "r.jsonl"))


def test_command_line_says_what_is_wrong(backend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--url", backend().url, "--rate", "100", "--journal", str(tmp_path / "j"), "--stop-file", str(tmp_path / "no")]
    assert main(["--requests", str(tmp_path / "absent"), *common]) == 2
    assert "can't be read" in capsys.readouterr().err
    (tmp_path / "r.jsonl").write_text('{"features": {}}\n\nno json\n')
    assert main(["--requests", str(tmp_path / "r.jsonl"), *common]) == 2
    assert ":3: not JSON" in capsys.readouterr().err
    (tmp_path / "j").write_text("something else\n")
    assert main(["--requests", str(tmp_path / "r.jsonl"), *common]) == 2
    assert "not a journal of a replay" in capsys.readouterr().err
    (tmp_path / "k").mkdir()
    (tmp_path / "r.jsonl").write_text('{"features": {}}\n')
    assert main(["--requests", str(tmp_path / "r.jsonl"), *common[:4], "--journal", str(tmp_path / "k")]) == 2
    assert main(["--requests", str(tmp_path / "r.jsonl"), *common[:4], "--journal", str(tmp_path / "ok")]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 1


@pytest.mark.parametrize(("url", "rate", "workers"), [("ftp://x", 1, 1), ("http://x", 0, 1), ("http://x", 1, 0)])
async def test_wrong_arguments(tmp_path: Path, url: str, rate: float, workers: int) -> None:
    with pytest.raises(InputError):
        await replay([], url, rate_per_s=rate, workers=workers, journal=tmp_path / "j")


def test_full_disk_ends_the_replay_with_its_reason(backend: Any, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: both come as an error of write."""
    (tmp_path / "r.jsonl").write_text('{"features": {}}\n' * 20)
    argv = [
        sys.executable, "-m", "hafnium_local.replay", "--requests", str(tmp_path / "r.jsonl"), "--url", backend().url, "--rate", "100",
        "--journal", str(tmp_path / "j"),
    ]
    # Coverage couldn't write what it measured there, and would leave half a file
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    found = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)),
    )
    assert found.returncode == 2
    assert f"{tmp_path / 'j'}: can't be written: " in found.stderr


async def test_journal_that_is_no_file_is_refused(backend: Any) -> None:
    with pytest.raises(InputError, match="not a regular file"):
        await replay(rows(3), backend().url, rate_per_s=500, workers=1, journal=Path("/dev/full"))


async def test_each_row_is_in_a_count_whatever_its_id_is(backend: Any, tmp_path: Path) -> None:
    """Rows whose id no header can carry vanished with their task, and those that repeat one without a word."""
    server = backend()
    requests: list[dict[str, Any]] = [{"request_id": i, "features": {}} for i in ("a", "\0b", "é", "c d", "a", "a", " ", "\ud800")]
    for resumed in (0, 6):  # a second run finds the same repeated ones
        found = await replay(requests, server.url, rate_per_s=500, workers=4, journal=tmp_path / "j")
        assert (found.ok, found.answered, found.lost, found.repeated, found.resumed) == (6, 6, 0, 2, resumed)
    assert len(server.seen()) == 6


async def test_a_request_that_cannot_be_sent_at_all_ends_the_replay(backend: Any, tmp_path: Path) -> None:
    bad = {"request_id": "q", "features": {"amount": object()}}
    with pytest.raises(TypeError, match="not JSON serializable"):
        await replay([*rows(3), bad, *rows(9)], backend().url, rate_per_s=500, workers=2, journal=tmp_path / "j")
