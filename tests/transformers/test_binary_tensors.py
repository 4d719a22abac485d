"""V2 with a binary tensor for each field, which KServe's SDK decodes without checks: bad ones get a 4xx, good ones the right score."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hafnium_raw_http import RawAnswer, connect, read_answer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hafnium_contract.v2_binary import LENGTH_HEADER
from hafnium_testing import synthetic_rows

V2 = b"/v2/models/m/infer"
LENGTH = LENGTH_HEADER.encode()
KINDS = {str: "BYTES", bool: "BOOL", int: "INT64", float: "FP64"}


def packed(datatype: str, values: list[Any]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(v.encode())) + v.encode() for v in values)
    return np.array(values, {"BOOL": "?", "INT64": "<i8", "FP64": "<f8"}[datatype]).tobytes()


def columns(rows: list[dict[str, Any]]) -> dict[str, tuple[str, list[Any]]]:
    first = {**rows[0]["entity"], **rows[0]["features"]}
    return {name: (KINDS[type(value)], [{**r["entity"], **r["features"]}[name] for r in rows]) for name, value in first.items()}


def request(inputs: list[dict[str, Any]], tail: bytes, length: bytes | None = None) -> bytes:
    text = json.dumps({"id": "i", "inputs": inputs}).encode()
    given_length = b"%d" % len(text) if length is None else length
    return b"POST %s HTTP/1.1\r\nhost: h\r\nx-request-id: q\r\n%s: %s\r\ncontent-length: %d\r\n\r\n%s%s" % (
        V2, LENGTH, given_length, len(text) + len(tail), text, tail)


def tensors(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bytes]:
    made, tail = list[dict[str, Any]](), b""
    for name, (datatype, values) in columns(rows).items():
        data = packed(datatype, values)
        made.append({"name": name, "shape": [len(rows)], "datatype": datatype, "parameters": {"binary_data_size": len(data)}})
        tail += data
    return made, tail


@pytest.fixture(scope="module")
def rows(chain: Any) -> list[dict[str, Any]]:
    found = synthetic_rows(chain.contract, 40, seed=5)
    same = set(found[0]["features"])
    return [r for r in found if set(r["features"]) == same and None not in r["features"].values()][:2]


@pytest.fixture
def sockets(chain: Any) -> Iterator[tuple[socket.socket, socket.socket]]:
    with connect(chain.transformer.port) as one, connect(chain.transformer.port) as other:
        yield one, other


def scores(answer: RawAnswer) -> list[float]:
    assert answer.status == 200, answer
    return json.loads(answer.body)["outputs"][0]["data"]


@pytest.fixture(scope="module")
def right(chain: Any, rows: list[dict[str, Any]]) -> list[float]:
    """The scores that the rows have by /v1/score: both ways must agree. The events are now in both."""
    plain = [{k: r[k] for k in ("entity", "features")} for r in rows]
    want = [chain.transformer.post("/v1/score", r).json["score"] for r in plain]
    with connect(chain.transformer.port) as s:
        s.sendall(request(*tensors(rows)))
        got = scores(read_answer(s))
    assert got == pytest.approx(want, rel=1e-3)  # some features are ages: the two were asked a moment apart
    return got


def check(sockets: tuple[socket.socket, socket.socket], rows: list[dict[str, Any]], right: list[float], sent: bytes) -> RawAnswer:
    one, other = sockets
    one.sendall(sent)
    other.sendall(request(*tensors(rows)))
    assert scores(read_answer(other)) == pytest.approx(right, rel=1e-3)
    answer = read_answer(one)
    assert answer.status < 500, answer
    one.sendall(request(*tensors(rows)))
    assert scores(read_answer(one)) == pytest.approx(right, rel=1e-3)
    return answer


def test_sizes_that_overlap_or_run_backwards_are_refused(
    sockets: tuple[socket.socket, socket.socket], rows: list[dict[str, Any]], right: list[float],
) -> None:
    """The SDK would read one tensor's bytes as another's, and score them."""
    inputs, tail = tensors(rows)
    numbers = [k for k, one in enumerate(inputs) if one["datatype"] == "FP64"]
    assert numbers
    for k in (0, numbers[0], len(inputs) - 1):
        size = inputs[k]["parameters"]["binary_data_size"]
        for wrong in (-size, size + 8, size - 8, 0, 2**31, 2**63, float(size), True, str(size), None):
            changed = [{**one, "parameters": {"binary_data_size": wrong}} if j == k else one for j, one in enumerate(inputs)]
            assert check(sockets, rows, right, request(changed, tail)).status == 400, (k, wrong)


def test_a_header_length_that_is_wrong_negative_or_given_twice_is_refused(
    sockets: tuple[socket.socket, socket.socket], rows: list[dict[str, Any]], right: list[float],
) -> None:
    inputs, tail = tensors(rows)
    text = len(json.dumps({"id": "i", "inputs": inputs}))
    for wrong in (b"-%d" % len(tail), b"0", b"", b"%d" % (text - 1), b"%d" % (text + 1), b"9" * 20, b"1e3", b"+%d" % text, b"\xb2",
                  b"%d\r\n%s: %d" % (text, LENGTH, text)):
        assert check(sockets, rows, right, request(inputs, tail, wrong)).status == 400, wrong


def test_a_body_cut_anywhere_is_refused(
    sockets: tuple[socket.socket, socket.socket], rows: list[dict[str, Any]], right: list[float],
) -> None:
    inputs, tail = tensors(rows)
    for at in range(len(tail)):
        sockets[0].sendall(request(inputs, tail[:at]))
        assert read_answer(sockets[0]).status == 400, at
    check(sockets, rows, right, request(inputs, b""))


@pytest.mark.parametrize(("datatype", "value"), [
    ("INT64", 1.7), ("INT64", "1"), ("INT8", 300), ("BOOL", "no"), ("BOOL", 2), ("FP64", "1.5"), ("FP64", True), ("BYTES", 5),
    ("FP99", 1.0),
])
def test_a_value_that_is_not_of_its_datatype_is_refused_and_not_converted(
    chain: Any, rows: list[dict[str, Any]], datatype: str, value: Any,
) -> None:
    inputs = [{"name": n, "shape": [2], "datatype": d, "data": v} for n, (d, v) in columns(rows).items()]
    assert chain.transformer.post(V2.decode(), {"inputs": inputs}).status == 200
    amount = next(k for k, one in enumerate(inputs) if one["name"] == "transaction_amount")
    inputs[amount] = {**inputs[amount], "datatype": datatype, "data": [value, value]}
    assert chain.transformer.post(V2.decode(), {"inputs": inputs}).status in (400, 422)


changes = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["shape", "datatype", "name", "size", "gone", "twice"]), st.one_of(
    st.sampled_from([[2**31, 2**33], [-2], [0], [], [2, 1], [1, 2], [2.0], [2, 0], "x", None, 5, "FP32", "BYTES", "INT8", ""]),
    st.integers(-300, 300), st.text(max_size=4), st.floats())), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=changes, tail=st.none() | st.binary(max_size=300))
@example(changes=[(0, "shape", [2**31, 2**33])], tail=None)
def test_tensors_of_any_kind_are_refused_or_scored(
    sockets: tuple[socket.socket, socket.socket], rows: list[dict[str, Any]], right: list[float],
    changes: list[tuple[int, str, Any]], tail: bytes | None,
) -> None:
    inputs, good = tensors(rows)
    for which, what, value in changes:
        if not inputs:
            break
        k = which % len(inputs)
        if what == "gone":
            inputs = inputs[:k] + inputs[k + 1 :]
        elif what == "twice":
            inputs = [*inputs, inputs[k]]
        elif what == "size":
            inputs[k] = {**inputs[k], "parameters": {"binary_data_size": value}}
        else:
            inputs[k] = {**inputs[k], what: value}
    check(sockets, rows, right, request(inputs, good if tail is None else tail))


@pytest.mark.parametrize("path", [b"/v1/score", b"/v1/score/batch", b"/v1/models/m:predict", V2])
def test_nesting_of_any_depth_is_refused(chain: Any, path: bytes) -> None:
    forms = {
        b"/v1/score": b'{"features": {"transaction_amount": %s}}', b"/v1/score/batch": b'{"requests": %s}',
        b"/v1/models/m:predict": b'{"instances": %s}', V2: b'{"inputs": [{"name": "a", "datatype": "FP64", "shape": [1], "data": %s}]}',
    }
    with connect(chain.transformer.port) as s:
        for depth in [20, 64, 65, 500, *range(900, 1030, 2), 5000]:
            for nest in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
                body = forms[path].replace(b"%s", nest)
                s.sendall(b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n%s" % (path, len(body), body))
                answer = read_answer(s)
                one_bad_row = answer.status == 200 and path.endswith(b"batch") and b'"score"' not in answer.body
                assert one_bad_row or answer.status in (400, 422), (depth, answer)
