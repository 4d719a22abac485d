"""V2 with binary tensors, and JSON of every kind: bad bytes get a 4xx that says so, never a 5xx, a silence or a wrong score."""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hafnium_raw_http import RawAnswer, connect, read_answer
from hafnium_servers import Server, predictor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hafnium_contract.bundle import Bundle
from hafnium_contract.v2_binary import LENGTH_HEADER

V1, V2 = b"/v1/models/m:predict", b"/v2/models/m/infer"
COLUMNS = 15
MATRIX = np.linspace(0.0, 1.0, 2 * COLUMNS, dtype=np.float32).reshape(2, COLUMNS)
LENGTH = LENGTH_HEADER.encode()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plain")
    with predictor(bundle.path, folder, args=["--hot_path", "false", "--body_bytes_max", "200000"]) as running:
        running.wait()
        yield running


@pytest.fixture
def sockets(server: Server, plain: Server) -> Iterator[dict[str, socket.socket]]:
    """Kept-alive connections: what a bad request leaves behind on one shows in the next answer. A test's own: one that ends in between
    leaves an answer unread, which the next test would take for its own."""
    with connect(server.port) as hot, connect(plain.port) as slow, connect(server.port) as other:
        yield {"hot": hot, "plain": slow, "other": other}


def post(path: bytes, body: bytes, *lines: bytes) -> bytes:
    return b"".join([b"POST %s HTTP/1.1\r\nhost: h\r\n" % path, *(b"%s\r\n" % x for x in lines),
                     b"content-length: %d\r\n\r\n" % len(body), body])


def tensor_request(header: Any, tail: bytes, length: bytes | None = None, path: bytes = V2) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return post(path, text + tail, b"%s: %s" % (LENGTH, b"%d" % len(text) if length is None else length))


def announced(rows: int = 2, **changes: Any) -> dict[str, Any]:
    one = {"name": "features", "shape": [rows, COLUMNS], "datatype": "FP32",
           "parameters": {"binary_data_size": rows * COLUMNS * 4}}
    return {"id": "i", "inputs": [{**one, **changes}], "parameters": {"binary_data_output": False}}


GOOD = tensor_request(announced(), MATRIX.tobytes())


def ask(s: socket.socket, sent: bytes) -> RawAnswer:
    s.sendall(sent)
    return read_answer(s)


def scores(answer: RawAnswer) -> list[float]:
    assert answer.status == 200, answer
    return json.loads(answer.body)["outputs"][0]["data"]


@pytest.fixture(scope="module")
def right(server: Server) -> list[float]:
    with connect(server.port) as s:
        got = scores(ask(s, GOOD))
    assert len(got) == 2
    assert all(0.0 < v < 1.0 for v in got)
    assert got[0] != got[1]
    return got


def check(sockets: dict[str, socket.socket], right: list[float], sent: bytes) -> RawAnswer:
    """Both paths say the same, it is no 5xx, and neighbours on this and on another connection get their right scores."""
    sockets["hot"].sendall(sent)
    sockets["other"].sendall(GOOD)  # perhaps in the same turn of the event loop
    assert scores(read_answer(sockets["other"])) == right
    hot, slow = read_answer(sockets["hot"]), ask(sockets["plain"], sent)
    assert hot == slow
    assert hot.status < 500, hot
    if hot.status >= 400:
        assert dict(hot.headers)[b"content-type"] == b"application/problem+json"
        assert json.loads(hot.body)["detail"]
    else:
        assert all(0.0 <= v <= 1.0 for v in json.loads(hot.body).get("predictions", [])), hot
    assert scores(ask(sockets["hot"], GOOD)) == right
    return hot


WIDE = [0, -1, 1, 2, 3, COLUMNS, 2**31, 2**33, 2**63, -(2**63), 2**70, 1.0, 2.5, 1e308, True, None, "2", [2], {}]
sizes = st.lists(st.sampled_from(WIDE) | st.integers(-3, 40), max_size=4)
numbers = st.sampled_from(WIDE) | st.integers() | st.floats()
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
DATATYPES = ["FP32", "FP64", "FP16", "BF16", "INT64", "INT8", "UINT64", "BOOL", "BYTES", "", "fp32", 32, None]
inputs = st.fixed_dictionaries({
    "name": st.sampled_from(["features", "features", "features", "x", "", None, 5]),
    "shape": st.just([2, COLUMNS]) | sizes | anything,
    "datatype": st.just("FP32") | st.sampled_from(DATATYPES),
}, optional={
    "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.just(MATRIX.nbytes) | numbers | anything}) | anything,
    "data": anything | st.lists(numbers, min_size=30, max_size=30),
})
headers = st.fixed_dictionaries({"inputs": st.lists(inputs, max_size=3) | anything}, optional={
    "id": st.text(max_size=5) | leaves, "outputs": anything, "parameters": st.just({"binary_data_output": True}) | anything})
BAD_LENGTHS = [b"", b"0", b"-1", b"-60", b"+5", b"1e2", b"0x10", b"12 34", b"9" * 9, b"9" * 30, b"\xb2", b"1,1", b"null"]
lengths = st.none() | st.sampled_from(BAD_LENGTHS) | st.integers(0, 400).map(lambda n: b"%d" % n)
BYTES = MATRIX.tobytes()
tails = st.sampled_from([b"", BYTES, BYTES[:-1], BYTES + b"\x00", MATRIX.astype("<f8").tobytes()]) | st.binary(max_size=200)
FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FUZZ
@given(header=headers, length=lengths, tail=tails)
@example(header=announced(shape=[2**31, 2**33]), length=None, tail=MATRIX.tobytes())
@example(header=announced(shape=[-2, -COLUMNS]), length=None, tail=MATRIX.tobytes())
@example(header=announced(parameters={"binary_data_size": -MATRIX.nbytes}), length=None, tail=MATRIX.tobytes())
@example(header=announced(shape=[2.0, 15.0]), length=None, tail=MATRIX.tobytes())
@example(header=announced(parameters={"binary_data_size": 120.0}), length=None, tail=MATRIX.tobytes())
@example(header=announced(parameters={}, data=["0.5"] * 30), length=None, tail=b"")
@example(header=announced(parameters={}, data=[True] * 30), length=None, tail=b"")
@example(header=announced(parameters={}, data=[[0.5] * COLUMNS] * 2), length=None, tail=b"")
@example(header=announced(parameters={}, data=[1e39] * 30), length=None, tail=b"")
def test_a_tensor_header_of_any_kind_is_refused_or_scored_alike(
    sockets: dict[str, socket.socket], right: list[float], header: Any, length: bytes | None, tail: bytes,
) -> None:
    check(sockets, right, tensor_request(header, tail, length))


@pytest.mark.parametrize("path", [V1, V2], ids=["v1", "v2"])
@FUZZ
@given(body=anything | headers, change=st.none() | st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=3)))
def test_json_of_any_kind_is_refused_or_scored_alike(
    sockets: dict[str, socket.socket], right: list[float], path: bytes, body: Any, change: tuple[float, bytes] | None,
) -> None:
    text = json.dumps(body).encode()
    if change is not None:  # also what is no UTF-8 any more
        at = int(change[0] * len(text))
        text = text[:at] + change[1] + text[at + 1 :]
    if path == V2 and b'"id"' not in text:
        return  # the SDK draws an id of its own then, and the answers differ by it
    check(sockets, right, post(path, text))


WRONG_LENGTHS = {"twice, alike": [b"%d", b"%d"], "twice, differently": [b"%d", b"5"], "twice, the right one last": [b"5", b"%d"]}


@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_a_header_length_that_is_given_twice_is_refused(sockets: dict[str, socket.socket], right: list[float], name: str) -> None:
    text = json.dumps(announced()).encode()
    lines = [b"%s: %s" % (LENGTH, v % len(text) if b"%" in v else v) for v in WRONG_LENGTHS[name]]
    assert check(sockets, right, post(V2, text + MATRIX.tobytes(), *lines)).status == 400


REFUSED: dict[str, tuple[dict[str, Any], bytes]] = {
    "a number in a string": (announced(parameters={}, data=["0.5"] * 30), b""),
    "two inputs": ({"inputs": announced()["inputs"] * 2}, MATRIX.tobytes() * 2),
    "no input": ({"inputs": []}, MATRIX.tobytes()),
    "a tensor that is too long": (announced(), MATRIX.tobytes() + b"\x00" * 4),
    "one row fewer than announced": (announced(3), MATRIX.tobytes()),
    "transposed": (announced(shape=[COLUMNS, 2]), MATRIX.tobytes()),
    "a product that fits and a shape that does not": (announced(shape=[1, 2 * COLUMNS]), MATRIX.tobytes()),
    "texts": (announced(datatype="BYTES"), b"".join(struct.pack("<I", 3) + b"0.5" for _ in range(30))),
    "halves": (announced(datatype="FP16", parameters={"binary_data_size": 60}), MATRIX.astype("<f2").tobytes()),
    "data and a tensor": (announced(data=[0.5] * 30), MATRIX.tobytes()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_matrix_of_the_contract_is_refused(sockets: dict[str, socket.socket], right: list[float], name: str) -> None:
    header, tail = REFUSED[name]
    assert check(sockets, right, tensor_request(header, tail)).status == 400


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e39, -1e308])
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_a_number_that_is_none_is_missing_and_an_infinite_one_is_refused(
    sockets: dict[str, socket.socket], right: list[float], value: float, datatype: str,
) -> None:
    dtype = "<f4" if datatype == "FP32" else "<f8"
    with np.errstate(over="ignore"):
        matrix = MATRIX.astype(dtype)
        matrix[1, 3] = value
        infinite = bool(np.isinf(matrix.astype(np.float32)).any())
    header = announced(datatype=datatype, parameters={"binary_data_size": matrix.nbytes})
    answer = check(sockets, right, tensor_request(header, matrix.tobytes()))
    assert answer.status == (400 if infinite else 200)
    if infinite:
        assert b"features[1][3]" in answer.body
    else:
        assert scores(answer)[0] == right[0]


def test_a_body_cut_at_any_byte_is_refused(sockets: dict[str, socket.socket], right: list[float]) -> None:
    text = json.dumps(announced()).encode()
    whole = text + MATRIX.tobytes()
    for at in range(len(whole)):
        sent = post(V2, whole[:at], b"%s: %d" % (LENGTH, len(text)))
        sockets["hot"].sendall(sent)
        assert read_answer(sockets["hot"]).status == 400, at
    check(sockets, right, post(V2, whole[:50], b"%s: %d" % (LENGTH, len(text))))


FEATURES = b'{"id": "a", "inputs": [{"name": "features", "datatype": "FP32", '
PLACES = {
    "V1, a row": (V1, b'{"instances": [%s]}', False), "V1": (V1, b"%s", False), "V2, id": (V2, b'{"id": %s, "inputs": []}', False),
    "V2, shape": (V2, FEATURES + b'"shape": %s, "data": [1]}]}', False),
    "V2, data": (V2, FEATURES + b'"shape": [2, 15], "data": %s}]}', False),
    "tensor, shape": (V2, FEATURES + b'"shape": %s}]}', True),
    "tensor, name": (V2, b'{"inputs": [{"name": %s}]}', True),
    "tensor, datatype": (V2, b'{"inputs": [{"name": "features", "datatype": %s}]}', True),
    "tensor, size": (V2, FEATURES + b'"shape": [2, 15], "parameters": {"binary_data_size": %s}}]}', True),
    "tensor, data": (V2, FEATURES + b'"shape": [2, 15], "data": %s}]}', True),
}


@pytest.mark.parametrize("name", PLACES)
def test_nesting_of_any_depth_is_refused(sockets: dict[str, socket.socket], right: list[float], name: str) -> None:
    """Also where a parser's limit ends and another's has not begun: each depth about there."""
    path, form, tensor = PLACES[name]
    for depth in [10, 63, 64, 65, 500, *range(900, 1030), 5000, 20_000]:
        for nest in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            body = form.replace(b"%s", nest)
            sent = tensor_request(body, b"") if tensor else post(path, body)
            for which in ("hot", "plain"):
                answer = ask(sockets[which], sent)
                assert answer.status == 400, (which, depth, answer)
    assert scores(ask(sockets["hot"], GOOD)) == right


@pytest.mark.parametrize("line", [b"x-a: \xff\xfe", b"x-hafnium-contract: \xff", b"x-hafnium-deadline-ms: \xff", b"x-request-id: \xc3\x28",
                                  b"content-type: \xff", b"content-type: application/octet-stream", b"ce-id: \xff"])
@pytest.mark.parametrize("kind", ["V1", "tensor"])
def test_headers_that_are_no_text_do_no_harm(sockets: dict[str, socket.socket], right: list[float], line: bytes, kind: str) -> None:
    body = json.dumps({"instances": [[0.5] * COLUMNS]}).encode()
    text = json.dumps(announced()).encode()
    tensor = post(V2, text + MATRIX.tobytes(), b"%s: %d" % (LENGTH, len(text)), line)
    check(sockets, right, post(V1, body, line) if kind == "V1" else tensor)


@pytest.mark.parametrize("value", ["0.5", "x", "", {}, [[0.5]]], ids=str)
def test_a_value_of_v2_json_that_is_no_number_is_refused(sockets: dict[str, socket.socket], right: list[float], value: Any) -> None:
    header = announced(data=[value, *[0.5] * 29])
    del header["inputs"][0]["parameters"]
    assert check(sockets, right, post(V2, json.dumps(header).encode())).status == 400


def test_a_key_that_is_given_twice_means_the_same_on_both_paths(sockets: dict[str, socket.socket], right: list[float]) -> None:
    one = json.dumps(announced()).encode()
    for body in (one[:-1] + b', "inputs": []}', b'{"inputs": [], ' + one[1:], one.replace(b'"shape"', b'"shape": [9, 15], "shape"')):
        check(sockets, right, tensor_request(body, MATRIX.tobytes()))
