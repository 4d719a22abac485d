"""The hot path answers exactly what the plain one answers, to good bytes and to bad ones, however they arrive."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hafnium_raw_http import RawAnswer, answers, exchange
from hafnium_servers import Server, predictor
from hafnium_steady_load import SteadyLoad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hafnium_contract.bundle import Bundle
from hafnium_contract.model_contract import ModelContract
from hafnium_contract.serving.hot_protocol import HeadReader
from hafnium_contract.v2_binary import LENGTH_HEADER, request_header
from hafnium_testing import synthetic_matrix

V1, V2 = b"/v1/models/m:predict", b"/v2/models/m/infer"
COLUMNS = 15


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plain")
    with predictor(bundle.path, folder, args=["--hot_path", "false", "--body_bytes_max", "200000"]) as running:
        running.wait()
        yield running


def post(path: bytes, body: bytes, headers: list[bytes] | None = None, line: bytes | None = None) -> bytes:
    head = [line or b"POST %s HTTP/1.1" % path, b"Host: h", b"Content-Type: application/json", *(headers or [])]
    if not any(h.lower().startswith((b"content-length", b"transfer-encoding")) for h in headers or []):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def v1_body(rows: Any) -> bytes:
    return json.dumps({"instances": rows}).encode()


ROW: list[Any] = [0.5] * COLUMNS
GOOD_V1 = v1_body([ROW])
GOOD_V2 = json.dumps({"id": "a", "inputs": [
    {"name": "features", "shape": [1, COLUMNS], "datatype": "FP32", "data": ROW}]}).encode()


def binary(rows: int = 1) -> bytes:
    header = request_header(rows, COLUMNS)
    body = header + np.full((rows, COLUMNS), 0.25, np.float32).tobytes()
    return post(V2, body, [f"{LENGTH_HEADER}: {len(header)}".encode()])


def same(server: Server, plain: Server, pieces: list[bytes]) -> list[RawAnswer]:
    hot: list[RawAnswer] = []
    slow: list[RawAnswer] = []
    for silence_s in (0.4, 1.5, 5.0):  # a machine that is busy elsewhere may be silent in the middle; a difference stays
        hot, slow = (answers(exchange(s.port, pieces, silence_s=silence_s)) for s in (server, plain))
        if hot == slow:
            break
    assert hot == slow
    return hot


BODIES: dict[str, bytes] = {
    "a row": GOOD_V1,
    "rows": v1_body([ROW] * 7),
    "null": v1_body([[None, *ROW[1:]]]),
    "true": v1_body([[True, *ROW[1:]]]),
    "a number in a string": v1_body([["1", *ROW[1:]]]),
    "a row too short": v1_body([ROW[1:]]),
    "rows of two widths": v1_body([ROW, ROW[1:]]),
    "no row": v1_body([]),
    "an object for a row": v1_body([{"a": 1}]),
    "1e39": v1_body([[1e39, *ROW[1:]]]),
    "1e400": GOOD_V1.replace(b"0.5", b"1e400", 1),
    "Infinity": GOOD_V1.replace(b"0.5", b"Infinity", 1),
    "NaN": GOOD_V1.replace(b"0.5", b"NaN", 1),
    "2^70": v1_body([[2**70, *ROW[1:]]]),
    "-0.0": v1_body([[-0.0, *ROW[1:]]]),
    "another key too": json.dumps({"instances": [ROW], "more": 1}).encode(),
    "the key twice": GOOD_V1[:-1] + b', "instances": []}',
    "half of it": GOOD_V1[:-9],
    "bad UTF-8": GOOD_V1.replace(b"instances", b"inst\xffnces"),
    "a byte order mark": b"\xef\xbb\xbf" + GOOD_V1,
    "nothing": b"",
    "a list": b"[]",
    "deep": b"[" * 5000,
    "V2": GOOD_V2,
    "V2 with rows in rows": json.dumps({"id": "b", "inputs": [
        {"name": "features", "shape": [2, COLUMNS], "datatype": "FP64", "data": [ROW, ROW]}]}).encode(),
    "V2 of another shape": GOOD_V2.replace(b"[1, 15]", b"[3, 5]"),
    "V2 of another type": GOOD_V2.replace(b"FP32", b"INT64"),
    "V2 with 1 for 1.0": GOOD_V2.replace(b"0.5", b"1"),
    "V2 with null": GOOD_V2.replace(b"0.5", b"null", 1),
    "V2 with parameters": GOOD_V2[:-1] + b', "parameters": {"binary_data_output": true}}',
    "V2 with outputs": GOOD_V2[:-1] + b', "outputs": [{"name": "score"}]}',
    "V2 with an id that is a number": GOOD_V2.replace(b'"a"', b"5"),
}


@pytest.mark.parametrize("path", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_gets_the_same_answer_on_both_paths(server: Server, plain: Server, name: str, path: bytes) -> None:
    [first, last] = same(server, plain, [post(path, BODIES[name])])
    assert not first.status_line.startswith(b"HTTP/1.1 5")
    assert last.status_line == b"HTTP/1.1 200 OK"


HEADS: dict[str, bytes] = {
    "two lengths": post(V1, GOOD_V1, [b"Content-Length: %d" % len(GOOD_V1), b"Content-Length: 3"]),
    "the same length twice": post(V1, GOOD_V1, [b"Content-Length: %d" % len(GOOD_V1)] * 2),
    "length and chunks": post(V1, GOOD_V1, [b"Content-Length: 5", b"Transfer-Encoding: chunked"]),
    "chunks": post(V1, b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD_V1), GOOD_V1), [b"Transfer-Encoding: chunked"]),
    "a space before the colon": post(V1, GOOD_V1, [b"Content-Length : %d" % len(GOOD_V1)]),
    "a plus before the length": post(V1, GOOD_V1, [b"Content-Length: +%d" % len(GOOD_V1)]),
    "a hexadecimal length": post(V1, GOOD_V1, [b"Content-Length: 0x%x" % len(GOOD_V1)]),
    "white space behind the length": post(V1, GOOD_V1, [b"Content-Length: %d \t" % len(GOOD_V1)]),
    "an enormous length": post(V1, GOOD_V1, [b"Content-Length: 99999999999999999999"]),
    "a folded line": post(V1, GOOD_V1, [b"X-A: b\r\n c"]),
    "a bare line feed": post(V1, GOOD_V1, [b"X-A: b\nX-C: d"]),
    "a bare carriage return": post(V1, GOOD_V1, [b"X-A: b\rc"]),
    "a zero byte": post(V1, GOOD_V1, [b"X-A: \x00"]),
    "Latin letters": post(V1, GOOD_V1, ["X-A: é".encode("latin-1")]),
    "expect": post(V1, GOOD_V1, [b"Expect: 100-continue"]),
    "upgrade": post(V1, GOOD_V1, [b"Connection: upgrade", b"Upgrade: h2c"]),
    "close": post(V1, GOOD_V1, [b"Connection: close"]),
    "HTTP/1.0": post(V1, GOOD_V1, line=b"POST %s HTTP/1.0" % V1),
    "a query": post(V1, GOOD_V1, line=b"POST %s?x=1 HTTP/1.1" % V1),
    "an escape": post(V1, GOOD_V1, line=b"POST /v1/models/%6d:predict HTTP/1.1"),
    "an absolute URL": post(V1, GOOD_V1, line=b"POST http://h%s HTTP/1.1" % V1),
    "two spaces": post(V1, GOOD_V1, line=b"POST  %s HTTP/1.1" % V1),
    "lower case": post(V1, GOOD_V1, line=b"post %s HTTP/1.1" % V1),
    "another model": post(b"/v1/models/x:predict", GOOD_V1),
    "our contract's name": post(V1, GOOD_V1, [b"x-hafnium-contract: sha256:00"]),
    "no time left": post(V1, GOOD_V1, [b"x-hafnium-deadline-ms: 0"]),
    "a deadline that is no number": post(V1, GOOD_V1, [b"x-hafnium-deadline-ms: soon"]),
    "binary": binary(),
    "binary with a wrong length": binary().replace(b"inference-header-content-length: 1", b"inference-header-content-length: 9"),
    "two at once": post(V1, GOOD_V1) + binary(3),
    "an empty line before it": b"\r\n" + post(V1, GOOD_V1),
    "rubbish behind it": post(V1, GOOD_V1) + b"rubbish\r\n\r\n",
    "a long head": post(V1, GOOD_V1, [b"X-A: " + b"a" * 20_000]),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_gets_the_same_answer_on_both_paths(server: Server, plain: Server, name: str) -> None:
    assert same(server, plain, [HEADS[name]])


WHOLE = [post(V1, GOOD_V1), post(V2, GOOD_V2), binary(2), post(V1, GOOD_V1[:-2]), b"GET /metrics"]
SCRAPS = [b"", b"\r\n", b"\n", b" ", b":", b"0", b"\x00", b"\xff", b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n",
          b"GET / HTTP/1.1\r\n\r\n"]
pieces = st.lists(st.sampled_from(WHOLE), max_size=3)
edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(SCRAPS), st.integers(0, 4)), max_size=3)
cuts = st.lists(st.floats(0, 1), max_size=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=pieces, edits=edits, cuts=cuts)
def test_bytes_get_the_same_answers_on_both_paths(
    server: Server, plain: Server, pieces: list[bytes], edits: list[tuple[float, bytes, int]], cuts: list[float],
) -> None:
    sent = b"".join(pieces)
    for where, what, instead in edits:
        at = int(where * len(sent))
        sent = sent[:at] + what + sent[at + instead :]
    places = sorted(int(c * len(sent)) for c in cuts)
    parts = [sent[a:b] for a, b in zip([0, *places], [*places, len(sent)], strict=True)]
    same(server, plain, [p for p in parts if p])


def test_a_request_that_comes_byte_by_byte_is_answered(server: Server) -> None:
    [first, _] = answers(exchange(server.port, [bytes([b]) for b in post(V1, GOOD_V1)]))
    assert first.status_line == b"HTTP/1.1 200 OK"


def test_requests_that_arrive_together_get_their_own_answers(server: Server, contract: ModelContract) -> None:
    matrix = synthetic_matrix(contract, 64, seed=9)
    bodies = [v1_body([[None if np.isnan(v) else float(v) for v in row]]) for row in matrix]
    alone = [json.loads(answers(exchange(server.port, [post(V1, b)]))[0].body)["predictions"] for b in bodies]
    bodies[20] = v1_body([ROW[1:]])  # one of them is wrong, and nobody else has to suffer for it
    sockets = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in bodies]
    for s, body in zip(sockets, bodies, strict=True):
        s.sendall(post(V1, body))
    got = [answers(s.recv(2**16))[0] for s in sockets]
    for s in sockets:
        s.close()
    assert got[20].status_line.split()[1] == b"400"
    together = [json.loads(a.body)["predictions"] for k, a in enumerate(got) if k != 20]
    assert together == [score for k, score in enumerate(alone) if k != 20]


def test_a_client_that_leaves_before_its_answer_harms_nobody(server: Server) -> None:
    for _ in range(50):
        s = socket.create_connection(("127.0.0.1", server.port))
        s.sendall(post(V1, GOOD_V1))
        s.close()
    assert answers(exchange(server.port, [post(V1, GOOD_V1)]))[0].status_line == b"HTTP/1.1 200 OK"


def test_every_request_is_counted_once(server: Server) -> None:
    def count() -> float:
        text = server.get("/metrics").body.decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("inference_requests_total{"))

    before = count()
    for request in (post(V1, GOOD_V1), post(V1, b"no"), binary(), post(V2, GOOD_V2)):
        exchange(server.port, [request])
    assert count() - before == 4


def test_sigterm_under_load_loses_nothing(tmp_path: Path, bundle: Bundle) -> None:
    with predictor(bundle.path, tmp_path) as running:
        running.wait()
        with SteadyLoad(running.port, [post(V1, GOOD_V1)], clients=8) as load:
            load.wait_for(200)
            load.ending()
            assert running.stop() == 0
    assert not load.lost


def test_repeated_header_lines_do_not_fill_the_memory() -> None:
    reader = HeadReader()
    for i in range(5000):
        assert reader.read(b"content-length: 1\r\nx-request-id: %d" % i) == {b"content-length": b"1", b"x-request-id": b"%d" % i}
    assert len(vars(reader)["_kept"]) <= 1024
