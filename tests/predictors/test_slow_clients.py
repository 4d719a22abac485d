"""Clients that are slow, silent or gone end by a limit, and nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from hafnium_raw_http import RawAnswer, answers, ask, closed_within, connect, read_answer
from hafnium_servers import Server, predictor

from hafnium_contract.bundle import Bundle

V1 = b"/v1/models/m:predict"
ROW: list[Any] = [0.5] * 15
BODY = json.dumps({"instances": [ROW]}).encode()
HEAD = b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % (V1, len(BODY))
GOOD = HEAD + BODY
PATIENCE_S = 30.0
"""For what has to come: the limits below are of a second, and the machine may be busy."""


@pytest.fixture(scope="module", params=["hot path", "plain path"])
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    args = ["--read_timeout_s", "1", "--write_timeout_s", "1", "--head_bytes_max", "8192", "--connections_max", "250",
            "--hot_path", "true" if request.param == "hot path" else "false"]
    with predictor(bundle.path, tmp_path_factory.mktemp("limited"), args=args) as running:
        running.wait()
        yield running


@pytest.fixture(scope="module")
def right(limited: Server) -> bytes:
    answer = ask(limited.port, GOOD)
    assert answer.status == 200
    return answer.body


BEGINNINGS = {
    "half a request line": b"POST /v1/mod",
    "half a head": HEAD[:60],
    "a head without its body": HEAD,
    "half a body": GOOD[:-20],
    "half a chunk": b"POST %s HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n40\r\nabc" % V1,
    "a whole request and half of another": GOOD + HEAD,
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_request_that_does_not_arrive_gets_408_and_others_their_scores(limited: Server, right: bytes, name: str) -> None:
    with connect(limited.port) as slow:
        slow.sendall(BEGINNINGS[name])
        assert ask(limited.port, GOOD).body == right
        got = answers(closed_within(slow, PATIENCE_S))
    assert [a.status for a in got] == ([200] if name.startswith("a whole") else []) + [408]
    assert dict(got[-1].headers)[b"content-type"] == b"application/problem+json"
    assert b"did not arrive within 1 s" in got[-1].body
    assert ask(limited.port, GOOD).body == right


@pytest.mark.parametrize("begun", [b"", HEAD], ids=["head", "body"])
def test_a_client_that_drips_bytes_ends_by_the_same_limit(limited: Server, right: bytes, begun: bytes) -> None:
    """Each byte is progress, so only a limit on the whole request helps."""
    drops = iter(GOOD[len(begun) :])
    with connect(limited.port) as slow:
        slow.sendall(begun)
        slow.settimeout(0.05)
        raw, until = b"", time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                slow.sendall(bytes([next(drops)]))
                part = slow.recv(2**16)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not part:
                break
            raw += part
    assert answers(raw)[0].status == 408
    assert ask(limited.port, GOOD).body == right


def test_a_connection_on_which_nothing_comes_ends_too(bundle: Bundle, tmp_path: Path) -> None:
    with predictor(bundle.path, tmp_path, args=["--keep_alive_s", "1"]) as running:
        running.wait()
        for nothing in (b"", b"\r\n", b"\r\n\r\n"):  # empty lines before a request are none of it
            with connect(running.port) as silent:
                silent.sendall(nothing)
                assert closed_within(silent, PATIENCE_S) == b""
        with connect(running.port) as silent:
            silent.sendall(GOOD)
            assert read_answer(silent).status == 200
            silent.sendall(b"\r\n")
            assert closed_within(silent, PATIENCE_S) == b""


def test_a_connection_that_goes_on_asking_stays_and_ends_when_it_stops(bundle: Bundle, tmp_path: Path) -> None:
    with predictor(bundle.path, tmp_path, args=["--keep_alive_s", "1"]) as running:
        running.wait()
        with connect(running.port) as steady:
            asked = began = time.monotonic()
            while time.monotonic() < began + 2.5:
                asked = time.monotonic()
                steady.sendall(GOOD)
                assert read_answer(steady).status == 200
                time.sleep(0.2)
            assert closed_within(steady, PATIENCE_S) == b""
            assert time.monotonic() - asked > 0.95


@pytest.mark.parametrize("line", [b"x-a: " + b"a" * 20_000 + b"\r\n", b"x-a: b\r\n" * 3000], ids=["one long line", "many lines"])
def test_a_head_without_end_gets_431(limited: Server, right: bytes, line: bytes) -> None:
    with connect(limited.port) as s:
        s.sendall(b"POST %s HTTP/1.1\r\n" % V1)
        got = b""
        try:
            for at in range(0, len(line), 1000):
                s.sendall(line[at : at + 1000])
                time.sleep(0.001)  # pieces of their own: what comes together with the beginning is bounded by the socket's buffer
        except ConnectionError:
            pass
        got = closed_within(s, PATIENCE_S)
    assert answers(got)[0].status == 431
    assert ask(limited.port, GOOD).body == right


def test_a_head_without_end_is_refused_behind_the_answers_that_are_due(limited: Server, right: bytes) -> None:
    with connect(limited.port) as s:
        s.sendall(GOOD.replace(b"host: h", b"host: h\r\naccept-language: x") + b"POST %s HTTP/1.1\r\n" % V1 + b"x-a: b\r\n" * 3000)
        got = answers(closed_within(s, PATIENCE_S))
    assert [a.status for a in got] == [200, 431]
    assert got[0].body == right


@pytest.mark.parametrize("line", [b"x-a: " + b"a" * 200_000, b"x-a: b\r\n" * 30_000], ids=["one long line", "many lines"])
def test_fields_behind_a_body_have_the_limit_of_a_head(limited: Server, right: bytes, line: bytes) -> None:
    with connect(limited.port) as s:
        try:
            s.sendall(b"POST %s HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" % V1)
            for at in range(0, len(line), 1000):
                s.sendall(line[at : at + 1000])
        except ConnectionError:
            pass
        got = answers(closed_within(s, PATIENCE_S))
    assert [a.status for a in got] in ([431], [])
    assert ask(limited.port, GOOD).body == right


def test_a_long_body_in_small_chunks_is_no_long_head(limited: Server, right: bytes) -> None:
    with connect(limited.port) as s:
        s.sendall(b"POST %s HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" % V1)
        padded = BODY + b" " * 40_000
        for at in range(0, len(padded), 500):
            part = padded[at : at + 500]
            s.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        s.sendall(b"0\r\n\r\n")
        answer = read_answer(s)
    assert (answer.status, answer.body) == (200, right)


def test_a_client_that_closed_its_side_gets_what_is_due(limited: Server, right: bytes) -> None:
    with connect(limited.port) as s:
        s.sendall(GOOD)
        s.shutdown(socket.SHUT_WR)
        [answer] = answers(closed_within(s, PATIENCE_S))
    assert (answer.status, answer.body) == (200, right)


def test_a_client_that_closed_its_side_in_the_middle_holds_nothing(limited: Server, right: bytes) -> None:
    for part in (GOOD[:-5], HEAD[:30], GOOD + HEAD[:30]):
        with connect(limited.port) as s:
            s.sendall(part)
            s.shutdown(socket.SHUT_WR)
            assert [a.status for a in answers(closed_within(s, PATIENCE_S))] in ([], [200], [408])
    for _ in range(30):  # and those that just vanish
        s = connect(limited.port)
        s.sendall(GOOD[:-5])
        s.close()
    assert ask(limited.port, GOOD).body == right
    assert open_connections(limited) == 0


def open_connections(server: Server) -> int:
    """Connections that the server still has; waits for them to go."""
    held, until = [""], time.monotonic() + PATIENCE_S
    while held and time.monotonic() < until:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        # those of the port that are established or that only the client has closed
        held = [r[2] for r in rows if r[1].endswith(f":{server.port:04X}") and r[3] in ("01", "08")]
        time.sleep(0.02)
    return len(held)


def test_idle_connections_cost_others_nothing_and_one_too_many_is_told(limited: Server, right: bytes) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(limited.port)) for _ in range(200)]
        assert ask(limited.port, GOOD).body == right
        idle += [stack.enter_context(connect(limited.port)) for _ in range(60)]
        refused = answers(closed_within(idle[-1], PATIENCE_S))
        assert [a.status for a in refused] == [503]
        assert dict(refused[0].headers)[b"retry-after"] == b"1"
        idle[0].sendall(GOOD)
        assert read_answer(idle[0]).body == right
    assert ask(limited.port, GOOD).body == right


PROBES = (b"/health/live", b"/health/ready", b"/v2/health/live", b"/metrics", b"/")


def probe(port: int, path: bytes) -> RawAnswer:
    return ask(port, b"GET %s HTTP/1.1\r\nhost: h\r\n\r\n" % path)


def test_whoever_takes_all_places_does_not_make_probes_fail(limited: Server, right: bytes) -> None:
    """Far more silent connections than there are places, and again and again new ones: health and metrics are answered, nothing else is."""
    with ExitStack() as stack:
        for _ in range(3):
            held = [stack.enter_context(connect(limited.port)) for _ in range(270)]
            for path in PROBES:
                answer = probe(limited.port, path)
                assert (path, answer.status) == (path, 200)
                assert dict(answer.headers)[b"connection"] == b"close"
            refused = ask(limited.port, GOOD)
            assert (refused.status, dict(refused.headers)[b"retry-after"]) == (503, b"1")
            for other in (b"GET /v1/models/m/contract HTTP/1.1\r\nhost: h\r\n\r\n", b"GET /health/livex HTTP/1.1\r\nhost: h\r\n\r\n"):
                assert ask(limited.port, other).status == 503
        with connect(limited.port) as s:  # health, and then what it is not there for
            s.sendall(b"GET /health/live HTTP/1.1\r\nhost: h\r\n\r\n" + GOOD)
            assert [a.status for a in answers(closed_within(s, PATIENCE_S))] == [200]
        with connect(limited.port) as s:  # half a probe holds its place for a second
            s.sendall(b"GET /health/live HTTP/1.1\r\nhost:")
            assert [a.status for a in answers(closed_within(s, PATIENCE_S))] in ([], [503])
        del held
    assert open_connections(limited) == 0
    assert ask(limited.port, GOOD).body == right


def test_a_client_that_asks_on_and_never_reads_is_cut_off_and_fills_no_memory(limited: Server, right: bytes) -> None:
    assert limited.process is not None
    process = psutil.Process(limited.process.pid)
    before = process.memory_info().rss
    flood = (b"GET /v1/models/m/contract HTTP/1.1\r\nhost: h\r\n\r\n" * 9 + GOOD) * 100
    with ExitStack() as stack:
        greedy = [stack.enter_context(connect(limited.port)) for _ in range(5)]
        for s in greedy:
            s.setblocking(False)
        until, cut = time.monotonic() + PATIENCE_S, set[socket.socket]()
        highest = before
        while len(cut) < len(greedy) and time.monotonic() < until:
            for s in greedy:
                if s in cut:
                    continue
                try:
                    s.send(flood)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    cut.add(s)
            highest = max(highest, process.memory_info().rss)
            assert ask(limited.port, GOOD).body == right
    assert len(cut) == len(greedy)
    assert highest - before < 100 * 2**20  # five connections, each with a socket's buffer of requests and one of answers
    assert open_connections(limited) == 0
