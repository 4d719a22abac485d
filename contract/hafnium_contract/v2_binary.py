"""Open Inference Protocol V2 with binary tensors: the bytes of the hop between transformer and predictor.

A message is a JSON header, whose length an HTTP header gives, and the tensors' bytes after it (little endian, row by row).
The header of our own requests depends on the shape only, so both sides keep the headers they have seen: parsing JSON would
cost more than the inference.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.errors import HafniumError
from hafnium_contract.json_nesting import NESTING_MAX, nested_too_deep

LENGTH_HEADER = "inference-header-content-length"
_CACHED_HEADER_BYTES_MAX = 1024
_CACHED_HEADERS_MAX = 2048
_NUMBERS = frozenset({int, float, bool, type(None)})
_ITEM_BYTES = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "INT32": 4, "UINT32": 4, "FP32": 4, "INT64": 8,
               "UINT64": 8, "FP64": 8}
_ALIGNMENT = 16
"""Headers that we write are padded with spaces, so that the tensor behind them is aligned and needs no copy."""

Matrix = npt.NDArray[np.float32]


class TensorError(HafniumError):
    """A V2 message is not what it should be. The message says what was expected. Answer 400."""


@dataclass(frozen=True)
class InputHeader:
    """What a request's JSON header says."""

    request_id: str | None
    rows: int
    dtype: str
    """`<f4` or `<f8`."""
    size: int | None
    """Bytes of the binary tensor; None when the data is in the header."""
    data: tuple[Any, ...] | None
    binary_output: bool


@dataclass(frozen=True)
class BinaryRequest:
    matrix: Matrix
    request_id: str | None
    binary_output: bool


def _padded(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


@lru_cache(maxsize=_CACHED_HEADERS_MAX)
def request_header(rows: int, columns: int) -> bytes:
    """JSON header of a request with one float32 matrix [rows, columns] that wants binary tensors back."""
    return _padded({
        "inputs": [{"name": INPUT_NAME, "shape": [rows, columns], "datatype": "FP32",
                    "parameters": {"binary_data_size": rows * columns * 4}}],
        "parameters": {"binary_data_output": True},
    })


def decode_request(body: bytes, header_length: bytes, columns: int, rows_max: int) -> BinaryRequest:
    """Body and `inference-header-content-length` → the matrix [rows, columns] float32.

    Raises TensorError for anything that is not one input `features` of the right shape, type and size.
    """
    length = _header_length(body, header_length)
    header = body[:length]
    found = (_cached if length <= _CACHED_HEADER_BYTES_MAX else _parse)(header, columns, rows_max)
    if found.size is None:
        matrix = _from_lists(found, columns)
        if len(body) != length:
            raise TensorError(f"{len(body) - length} bytes follow the header, but its data is inside the header")
    else:
        if len(body) - length != found.size:
            raise TensorError(f"the header announces {found.size} bytes of tensor, {len(body) - length} follow it")
        tensor = np.frombuffer(body, found.dtype, offset=length).reshape(found.rows, columns)
        matrix = _to_float32(tensor)
    return BinaryRequest(matrix, found.request_id, found.binary_output)


def _to_float32(tensor: npt.NDArray[Any]) -> Matrix:
    if tensor.dtype == np.float32 and tensor.flags.aligned:
        return tensor
    with np.errstate(over="ignore"):  # too large becomes inf, which the caller refuses
        return tensor.astype(np.float32)


def _from_lists(found: InputHeader, columns: int) -> Matrix:
    try:
        check_numbers(found.data)
        flat = np.array(found.data, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise TensorError(f"inputs[0].data: expected numbers: {e}") from e
    if flat.size != found.rows * columns:
        raise TensorError(f"inputs[0].data: expected {found.rows * columns} numbers, got {flat.size}")
    return _to_float32(flat.reshape(found.rows, columns))


def check_numbers(data: Any) -> None:
    """Raises TensorError unless all values of these (nested) lists are numbers or null: numpy takes "1" for one, too."""
    if isinstance(data, list | tuple):
        for value in cast(list[Any], data):
            if type(value) not in _NUMBERS:
                if not isinstance(value, list):
                    raise TensorError(f"inputs[0].data: expected numbers, got {str(value)[:40]!r}")
                check_numbers(value)


def check_layout(body: bytes, header_length: bytes) -> None:
    """Raises TensorError unless header and tensors fill the body exactly, each tensor with the bytes that its shape and type need.

    For requests that KServe's SDK decodes: it takes negative sizes and sizes that overlap, and would read one tensor's bytes as another's.
    """
    length = _header_length(body, header_length)
    top = _object(body[:length])
    inputs = top.get("inputs")
    if not isinstance(inputs, list):
        raise TensorError("inputs: expected a list")
    at = length
    for k, one in enumerate(cast(list[Any], inputs)):
        where = f"inputs[{k}]"
        if not isinstance(one, dict):
            raise TensorError(f"{where}: expected an object")
        given = cast(dict[str, Any], one)
        shape = given.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in cast(list[Any], shape)):
            raise TensorError(f"{where}.shape: expected whole numbers that are not negative, got {str(shape)[:60]}")
        if given.get("data") is not None:
            continue
        count = math.prod(cast(list[int], shape))
        size = _member(given.get("parameters"), "binary_data_size")
        if type(size) is not int or not 0 <= size <= len(body) - at:
            raise TensorError(f"{where}.parameters.binary_data_size: expected 0 to {len(body) - at}, got {str(size)[:40]}")
        datatype = str(given.get("datatype"))[:20]
        if datatype == "BYTES":
            _check_texts(body[at : at + size], count, where)
        elif datatype not in _ITEM_BYTES:
            raise TensorError(f"{where}.datatype: expected BYTES or one of {', '.join(_ITEM_BYTES)}, got {datatype!r}")
        elif count * _ITEM_BYTES[datatype] != size:
            raise TensorError(f"{where}: {count} values of {datatype} take {count * _ITEM_BYTES[datatype]} bytes, {size} are announced")
        at += size
    if at != len(body):
        raise TensorError(f"{len(body) - at} bytes follow the last tensor")


def _check_texts(tensor: bytes, count: int, where: str) -> None:
    """BYTES: for each value four bytes of length, and the value."""
    at = found = 0
    while at + 4 <= len(tensor) and found <= count:
        at += 4 + int.from_bytes(tensor[at : at + 4], "little")
        found += 1
    if at != len(tensor) or found != count:
        raise TensorError(f"{where}: expected {count} values of BYTES, each after its length")


def _header_length(body: bytes, given: bytes) -> int:
    length = int(given) if given.isdigit() and len(given) < 10 else -1
    if not 0 < length <= len(body):
        raise TensorError(f"{LENGTH_HEADER}: expected 1 to {len(body)}, got {given.decode('latin-1')!r}")
    return length


def _object(header: bytes) -> dict[str, Any]:
    try:
        parsed: Any = json.loads(header)
    except (ValueError, RecursionError) as e:
        raise TensorError(f"header: not JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise TensorError(f"header: expected an object, got {type(parsed).__name__}")
    if nested_too_deep(parsed):
        raise TensorError(f"header: nested deeper than {NESTING_MAX}")
    return cast(dict[str, Any], parsed)


def _parse(header: bytes, columns: int, rows_max: int) -> InputHeader:
    top = _object(header)
    request_id = top.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise TensorError("id: expected a string")
    inputs = top.get("inputs")
    if not isinstance(inputs, list) or len(cast(list[Any], inputs)) != 1 or not isinstance(inputs[0], dict):
        raise TensorError(f"inputs: expected one input, named {INPUT_NAME!r}")
    one = cast(dict[str, Any], inputs[0])
    if one.get("name") != INPUT_NAME:
        raise TensorError(f"inputs[0].name: expected {INPUT_NAME!r}, got {str(one.get('name'))[:60]!r}")
    dtype = {"FP32": "<f4", "FP64": "<f8"}.get(str(one.get("datatype")))
    if dtype is None:
        raise TensorError(f"inputs[0].datatype: expected FP32 or FP64, got {str(one.get('datatype'))[:20]!r}")
    rows = _rows(one.get("shape"), columns, rows_max)
    data = one.get("data")
    size: int | None = None
    if data is None:
        size = rows * columns * np.dtype(dtype).itemsize
        announced = _member(one.get("parameters"), "binary_data_size")
        if announced != size:
            raise TensorError(f"inputs[0].parameters.binary_data_size: expected {size}, got {str(announced)[:40]}")
    elif not isinstance(data, list):
        raise TensorError("inputs[0].data: expected a list of numbers")
    values = None if data is None else tuple(cast(list[Any], data))
    return InputHeader(request_id, rows, dtype, size, values, _wants_binary(top))


_cached = lru_cache(maxsize=_CACHED_HEADERS_MAX)(_parse)


def _member(value: Any, key: str) -> Any:
    return cast(dict[str, Any], value).get(key) if isinstance(value, dict) else None


def _wants_binary(top: dict[str, Any]) -> bool:
    outputs = top.get("outputs")
    if isinstance(outputs, list) and outputs:
        wanted = [_member(_member(o, "parameters"), "binary_data") for o in cast(list[Any], outputs)]
        if any(w is not None for w in wanted):
            return all(w is True for w in wanted)
    return _member(top.get("parameters"), "binary_data_output") is True


def _rows(shape: Any, columns: int, rows_max: int) -> int:
    """Rows of a shape that must be [rows, columns]."""
    good = isinstance(shape, list) and all(type(s) is int for s in cast(list[Any], shape))
    sizes = cast(list[int], shape) if good else []
    if len(sizes) != 2 or sizes[1] != columns:
        raise TensorError(f"inputs[0].shape: expected [rows, {columns}], got {str(shape)[:60]}")
    if not 1 <= sizes[0] <= rows_max:
        raise TensorError(f"inputs[0].shape: {sizes[0]} rows; from 1 to {rows_max} are taken")
    return sizes[0]


@lru_cache(maxsize=_CACHED_HEADERS_MAX)
def _answer_header(rows: int, model_name: str, model_version: str) -> bytes:
    return _padded({
        "model_name": model_name, "model_version": model_version,
        "outputs": [
            {"name": SCORE_OUTPUT, "shape": [rows], "datatype": "FP32", "parameters": {"binary_data_size": rows * 4}},
            {"name": INTERVAL_OUTPUT, "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": rows * 8}},
        ],
    })


def encode_answer(
    score: Matrix, interval: Matrix, model_name: str, model_version: str, request: BinaryRequest,
) -> tuple[int | None, bytes]:
    """(header length, body) of an answer with score [rows] and interval [rows, 2]; None: the body is JSON alone."""
    rows = len(score)
    if request.binary_output and request.request_id is None:
        header = _answer_header(rows, model_name, model_version)
        return len(header), header + score.tobytes() + interval.tobytes()
    top: dict[str, Any] = json.loads(_answer_header(rows, model_name, model_version))
    if request.request_id is not None:
        top["id"] = request.request_id
    if request.binary_output:
        header = _padded(top)
        return len(header), header + score.tobytes() + interval.tobytes()
    for output, tensor in zip(top["outputs"], (score, interval), strict=True):
        del output["parameters"]
        output["data"] = tensor.reshape(-1).tolist()
    return None, json.dumps(top, separators=(",", ":")).encode()


def decode_answer(body: bytes, header_length: str, rows: int) -> tuple[Matrix, Matrix]:
    """A binary answer to a request of `rows` rows → score [rows], interval [rows, 2]. Raises TensorError.

    Relies on the two outputs' order and sizes, which the header is checked for once per distinct header.
    """
    length = int(header_length) if header_length.isdigit() else -1
    if not 0 < length <= len(body) or len(body) - length != rows * 12:
        raise TensorError(f"answer: expected a header and {rows * 12} bytes, got {len(body)} with header {header_length!r}")
    _check_answer(body[:length], rows)
    flat = np.frombuffer(body, "<f4", offset=length)
    return flat[:rows], flat[rows:].reshape(rows, 2)


@lru_cache(maxsize=_CACHED_HEADERS_MAX)
def _check_answer(header: bytes, rows: int) -> None:
    try:
        outputs = [(o["name"], o["shape"], o["datatype"]) for o in json.loads(header)["outputs"]]
    except (ValueError, KeyError, TypeError) as e:
        raise TensorError(f"answer: header can't be read: {e}") from e
    expected = [(SCORE_OUTPUT, [rows], "FP32"), (INTERVAL_OUTPUT, [rows, 2], "FP32")]
    if outputs != expected:
        raise TensorError(f"answer: expected outputs {expected}, got {outputs}")
