"""What Feast writes into its online stores, byte by byte: entity keys and values (entity key serialisation 3).

Feast stays who defines, registers and materialises; only the reading is done here, because `get_online_features` costs
0.6 ms of Python for a row. A property test reads the same entities through Feast: a version of Feast that writes otherwise
fails there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hafnium_contract.lean_imports import without
from hafnium_transformer.plan import ENTITY_NUMBER, Plan

if TYPE_CHECKING:
    from hafnium_transformer.online_store.value_columns import FoundColumns

EntityValue = str | int
Found = dict[str, tuple[Any, float]]
"""Column (`view__field`) → (raw value, event time in seconds since 1970). What has no value is not in it."""

KEY_VERSION = 3
"""`entity_key_serialization_version` of feature_store.yaml that this module knows."""
_STRING, _INT64 = 2, 4
DOUBLE_TAG, DOUBLE_BYTES = 0x29, 9
INT64_TAG, INT64_BYTES_MAX = 0x20, 9
"""Whole numbers from 0 to 2^56 - 1: tag and up to eight bytes of seven bits. Larger and negative ones are protobuf's business."""
_read_double = struct.Struct("<d").unpack_from


class OnlineStore(Protocol):
    """Where values are looked up. Used from the event loop only."""

    async def read(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> list[Found]:
        """Values for each entity row, in order.

        Raises OverloadedError (too many wait), DeadlineError (`timeout_s` is over), UnavailableError (the store failed).
        """
        ...

    async def read_columns(self, plan: Plan, entities: Sequence[dict[str, EntityValue]], timeout_s: float) -> FoundColumns:
        """The same in columns, for many rows: a quarter of the work (docs/performance.md)."""
        ...

    def close(self) -> None:
        """Lets go of connections and threads."""
        ...


def key_coder(join_key: str, entity_type: str | None) -> Callable[[EntityValue], bytes]:
    """A function that makes Feast's key of one entity. `entity_type`: ENTITY_TEXT or ENTITY_NUMBER, as in Plan.entity_types."""
    name = join_key.encode()
    prefix = struct.pack("<III", 1, _STRING, len(name)) + name
    if entity_type == ENTITY_NUMBER:
        number = struct.Struct("<IIq")
        return lambda value: prefix + number.pack(_INT64, 8, int(value))

    def text(value: EntityValue) -> bytes:
        encoded = str(value).encode()
        return prefix + struct.pack("<II", _STRING, len(encoded)) + encoded

    return text


def value_message() -> Any:
    """Feast's Value message. To import it is to import Feast, which takes seconds: not at import time."""
    with without("torch"):
        from feast.protos.feast.types.Value_pb2 import Value
    return Value


def value_reader() -> Callable[[bytes], Any]:
    """A function from the bytes of Feast's Value message to a Python value; None: there is none.

    Doubles and whole numbers, the most frequent, are read here: protobuf takes a microsecond for each.
    """
    from google.protobuf.message import DecodeError

    parse = value_message().FromString

    def read(data: bytes) -> Any:
        if len(data) == DOUBLE_BYTES and data[0] == DOUBLE_TAG:
            return _read_double(data, 1)[0]
        if 2 <= len(data) <= INT64_BYTES_MAX and data[0] == INT64_TAG and data[-1] < 0x80:
            number = data[-1]
            for byte in data[-2:0:-1]:
                if byte < 0x80:  # not one number: another field follows
                    break
                number = number << 7 | byte & 0x7F
            else:
                return number
        try:
            value = parse(data)
        except DecodeError:  # one corrupt value: as if it were not there, and not the end of a whole batch
            return None
        kind = value.WhichOneof("val")
        return None if kind is None else getattr(value, kind)

    return read
