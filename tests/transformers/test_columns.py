"""Many rows at once, by columns, give what each row gives alone: parsed, looked up, encoded. To the bit, and with the same words."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hafnium_redis import Redis
from hafnium_servers import make_feature_repo
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from kserve import InferInput, InferRequest

from hafnium_contract.contract_file import parse_contract
from hafnium_contract.encoding import PlainColumns, encode_value, number_column, plain_encoder
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_transformer.batch import Parsed, parse_columns, parse_each
from hafnium_transformer.batch_encoding import Encoded, encode_columns, encode_each
from hafnium_transformer.model import rows_of_v2
from hafnium_transformer.online_store.feast import FeastReader
from hafnium_transformer.online_store.records import Found, value_message, value_reader
from hafnium_transformer.online_store.redis import RedisStore
from hafnium_transformer.online_store.sqlite import ROWS_MAX, SqliteStore
from hafnium_transformer.online_store.value_columns import columns_of, plain_numbers
from hafnium_transformer.openapi import document
from hafnium_transformer.plan import ENTITY_NUMBER, ENTITY_TEXT, Plan, make_plan

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
NOW_S = NOW.timestamp()


def feature(name: str, missing: str, dtype: str = "float", **more: Any) -> dict[str, Any]:
    form: dict[str, Any] = {"category": {"categories": ["x", "yy", "é"]}, "bool": {}}.get(dtype, {"range": [-5, 100]})
    return {"name": name, "description": name, "dtype": dtype, "missing": missing, **form, **more}


def view(name: str, missing: str, dtype: str = "float", view: str = "usage", **more: Any) -> dict[str, Any]:
    return feature(name, missing, dtype, source={"view": view, "field": name.removeprefix(f"{view}_")}, **more)


@pytest.fixture(scope="module")
def contract() -> ModelContract:
    """Every type of feature, sent and looked up, with every policy; two views of one entity, one of another, a name in two views."""
    return parse_contract({
        "schemaVersion": 1, "name": "columns", "version": "1", "owner": "o", "description": "d",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "1d"}},
        "entities": [{"name": n, "joinKey": f"{n}_id"} for n in ("card", "shop", "other")],
        "views": [{"name": "usage", "entity": "card", "maxAge": "2h"}, {"name": "more", "entity": "card", "maxAge": "3h"},
                  {"name": "place", "entity": "shop", "maxAge": "2d"}],
        "features": [
            feature("amount", "reject"), feature("risk", "degrade", outOfRange="clamp"), feature("count", "impute", "int"),
            feature("clamped", "impute", "int", outOfRange="clamp"), feature("kind", "degrade", "category"),
            feature("flag", "impute", "bool"),
            view("usage_n", "degrade"), view("usage_must", "reject", outOfRange="clamp"), view("usage_kind", "impute", "category"),
            view("more_n", "impute", "int", "more"), view("more_flag", "degrade", "bool", "more", maxAge="10h"),
            view("place_n", "degrade", "int", "place", outOfRange="clamp"),
            feature("share", "reject", outOfRange="clamp", source={"derived": {"operation": "ratio", "inputs": ["amount", "usage_n"]}}),
            feature("hour", "impute", source={"derived": {"operation": "hour_of_day", "inputs": ["event_time"]}}),
        ],
        "decision": {"threshold": 0.5},
    })


@pytest.fixture(scope="module")
def plan(contract: ModelContract) -> Plan:
    return make_plan(contract, {"card_id": ENTITY_TEXT, "shop_id": ENTITY_NUMBER})


# --- values of a request -----------------------------------------------------------------------------------------------------------

ODD = st.sampled_from([
    None, math.nan, math.inf, True, False, "x", "yy", "no such", "", [], {}, [1], 2**53, 2**53 + 1, -(2**53) - 1, 10**400, 1e300, -0.0,
    100, 100.0, 100.5, -5, -5.000001, 1.5, 0, 1,
])


@settings(deadline=None)
@given(data=st.data())
def test_a_column_is_plainly_good_where_each_of_its_values_is(contract: ModelContract, data: st.DataObject) -> None:
    one: Feature = data.draw(st.sampled_from([f for f in contract.features if f.name not in ("share", "hour")]))
    numbers = st.floats(0, 50) | st.integers(0, 50)
    usual = {"category": st.sampled_from(one.categories or ("x",)), "bool": st.booleans()}.get(one.dtype, numbers)
    values = data.draw(st.lists(usual) | st.lists(usual | ODD))
    plain, column = plain_encoder(one), number_column(one)(values).reshape(1, -1)
    for value, number, good in zip(values, column[0], PlainColumns.of([one]).good(column)[0], strict=True):
        alone = plain(value)
        if alone is not None:
            assert good
        if good:  # or what is not plainly good to one is still the same
            assert struct.pack("<d", number) == struct.pack("<d", encode_value(one, value, "p"))


# --- rows of a request -------------------------------------------------------------------------------------------------------------

def usual_features(plan: Plan) -> st.SearchStrategy[dict[str, Any]]:
    values: dict[str, st.SearchStrategy[Any]] = {
        "amount": st.floats(0, 50), "risk": st.floats(-200, 200), "count": st.integers(0, 50), "clamped": st.integers(-200, 200),
        "kind": st.sampled_from(["x", "yy", "é"]), "flag": st.booleans(),
    }
    assert values.keys() == plan.fields
    return st.fixed_dictionaries(values)


def rows_of(plan: Plan) -> st.SearchStrategy[list[Any]]:
    features = usual_features(plan)
    times = st.just("2026-03-01T11:59:00Z") | st.sampled_from([
        None, "2026-03-01T13:59:00+02:00", "2026-03-01T11:59:00", "yesterday", 12, "2" * 50, "0001-01-01T00:00:00+10:00",
        "9999-12-31T23:59:59-10:00"])
    entity = st.fixed_dictionaries({"card_id": st.text(min_size=1, max_size=3), "shop_id": st.integers(-9, 9)})
    plain = st.fixed_dictionaries({"entity": entity, "features": features}, optional={
        "event_time": times, "request_id": st.text(min_size=1, max_size=4), "explain": st.booleans()})
    names = st.sampled_from(sorted(plan.fields))
    odd_features = st.builds(lambda f, name, value: {**f, name: value}, features, names | st.sampled_from(["new", "share"]), ODD) \
        | st.builds(lambda f, name: {k: v for k, v in f.items() if k != name}, features, names) \
        | st.sampled_from([None, {}, [], 1])
    odd_entity = st.builds(lambda e, key, value: {**e, key: value}, entity, st.sampled_from(["card_id", "shop_id", "other_id", "no"]),
                           st.sampled_from([None, "", "a", "b" * 257, 1, True, 2**63, -(2**63), 1.5, [], {}, "7", "-7", "07"])) \
        | st.sampled_from([None, {}, [], "c", {"card_id": "a"}])
    odd = st.builds(lambda row, key, value: {**row, key: value}, plain, st.just("features"), odd_features) \
        | st.builds(lambda row, key, value: {**row, key: value}, plain, st.just("entity"), odd_entity) \
        | st.builds(lambda row, key, value: {**row, key: value}, plain, st.sampled_from(["request_id", "explain", "event_time"]), ODD)
    strange = st.sampled_from([None, 1, "row", [], {}]) | st.builds(lambda row: {**row, "no": 1}, plain)
    return st.lists(plain, min_size=1, max_size=20) | st.lists(plain | odd, min_size=1, max_size=20) \
        | st.lists(plain | odd | strange, min_size=1, max_size=20)


def parsed_alike(plan: Plan, rows: list[Any]) -> tuple[Parsed, Parsed]:
    def parse(way: Any) -> Parsed:
        return way(plan, rows, request_ids=[f"r-{i}" for i in range(len(rows))], now_s=NOW_S, path_of=lambda i: f"rows[{i}]")

    return parse(parse_each), parse(parse_columns)


def bits(numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *[math.nan if n != n else n for n in numbers])


@settings(deadline=None)
@given(data=st.data())
def test_rows_read_by_columns_are_those_read_one_by_one_and_their_errors_too(plan: Plan, data: st.DataObject) -> None:
    rows = data.draw(rows_of(plan))
    before = json.dumps(rows)
    each, columns = parsed_alike(plan, rows)
    assert columns.places == each.places
    assert {i: e.problems for i, e in columns.errors.items()} == {i: e.problems for i, e in each.errors.items()}
    a, b = each.batch, columns.batch
    for k in range(len(a)):
        assert b.row(plan, k)._replace(values={}) == a.row(plan, k)._replace(values={})
        assert [type(v) for v in b.row(plan, k)] == [type(v) for v in a.row(plan, k)]
    assert (b.request_ids, b.event_times_s, b.entities, b.explained, b.lacking) == \
        (a.request_ids, a.event_times_s, a.entities, a.explained, a.lacking)
    assert bits(b.columns(plan).ravel().tolist()) == bits(a.columns(plan).ravel().tolist())
    assert json.dumps(rows) == before


KEYED = {"amount": 1.0, "risk": 1.0, "count": 1, "clamped": 1, "kind": "x", "flag": True}


def as_json(text: str) -> dict[str, Any]:
    return {"entity": {"card_id": "7", "shop_id": text}, "features": KEYED}


def as_v2(plan: Plan, text: str) -> dict[str, Any]:
    kinds = {"kind": "BYTES", "flag": "BOOL", "count": "INT64", "clamped": "INT64"}
    inputs = [InferInput("card_id", [1], "BYTES", ["7"]), InferInput("shop_id", [1], "BYTES", [text])]
    inputs += [InferInput(name, [1], kinds.get(name, "FP64"), [value]) for name, value in KEYED.items()]
    return rows_of_v2(InferRequest("m", inputs), plan, 10)[0]


@pytest.mark.parametrize("text", ["1001", "-5", "0", str(2**63 - 1), str(-(2**63) + 1)])
def test_the_plain_text_of_a_numbered_key_is_that_number(plan: Plan, text: str) -> None:
    for row in (as_json(text), as_v2(plan, text)):
        for parsed in parsed_alike(plan, [row, as_json(text), {**row, "entity": {"card_id": "7", "shop_id": int(text)}}]):
            assert not parsed.errors
            assert parsed.batch.entities == [{"card_id": "7", "shop_id": int(text)}] * 3, "one entity to store and log; a text stays one"


@pytest.mark.parametrize("text", [
    "0763", "1.0", "1e3", " 1", "1 ", "1\n", "+1", "-0", "-", "", "1_000", "١", "1" * 20, str(2**63), str(-(2**63)), "9" * 5000])
def test_any_other_text_for_a_numbered_key_is_refused_by_name(plan: Plan, text: str) -> None:
    entity = Draft202012Validator(document(plan, "m", "1")["components"]["schemas"]["Request"]["properties"]["entity"])
    assert all(entity.is_valid({"card_id": "7", "shop_id": key}) for key in (1001, "1001", "-5"))
    # a pattern can't count to 2^63, and Python's, unlike JSON Schema's, ends before a line's end
    assert not entity.is_valid({"card_id": "7", "shop_id": text}) or text in (str(2**63), str(-(2**63)), "1\n")
    for row in (as_json(text), as_v2(plan, text)):
        for parsed in parsed_alike(plan, [row, as_json("1")]):
            assert parsed.places == [1]
            (problem,) = parsed.errors[0].problems
            assert problem.path == "rows[0].entity.shop_id"
            assert problem.message.startswith("expected a whole number of 64 bits, as a number or its plain text")
            assert problem.message.endswith(", got " + (repr(text) if len(text) < 50 else repr(text)[:57] + "..."))


@settings(deadline=None)
@given(data=st.data())
def test_some_of_a_batch_and_two_joined_are_what_their_rows_are(plan: Plan, data: st.DataObject) -> None:
    each, columns = parsed_alike(plan, data.draw(rows_of(plan)))
    rows = [columns.batch.row(plan, k) for k in range(len(columns.batch))]
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(rows)))))) if rows else []
    for batch in (each.batch, columns.batch):
        some = batch.only(kept)
        assert repr([some.row(plan, k) for k in range(len(some))]) == repr([rows[k] for k in kept])
        if rows:
            joined = batch.and_then(plan, columns.batch)
            assert repr([joined.row(plan, k) for k in range(len(joined))]) == repr(rows + rows)


# --- values of a store -------------------------------------------------------------------------------------------------------------

VARINTS = st.integers(0, 2**63 - 1) | st.integers(0, 300) | st.sampled_from([2**53, 2**53 + 1, 2**56 - 1, 2**56])


@pytest.fixture(scope="module")
def feast_values() -> tuple[Any, Any]:
    """Feast's Value and the reader of one; importing it takes seconds, and not those of the test."""
    return value_message(), value_reader()


@settings(deadline=None)
@given(data=st.data())
def test_messages_read_together_are_the_numbers_that_each_of_them_holds(feast_values: tuple[Any, Any], data: st.DataObject) -> None:
    value, read = feast_values
    message = st.one_of(
        st.floats().map(lambda v: value(double_val=v)), st.floats(width=32).map(lambda v: value(float_val=v)),
        VARINTS.map(lambda v: value(int64_val=v)), st.integers(-(2**63), -1).map(lambda v: value(int64_val=v)),
        st.integers(-5, 5).map(lambda v: value(int32_val=v)), st.text(max_size=9).map(lambda v: value(string_val=v)),
        st.booleans().map(lambda v: value(bool_val=v)), st.just(value()), st.binary(max_size=9).map(lambda v: value(bytes_val=v)),
    ).map(lambda m: m.SerializeToString())
    broken = st.binary(max_size=12) | st.builds(lambda a, b: a + b, message, message) | st.builds(lambda a: a[:-1], message) \
        | st.builds(lambda n: b"\x20" + n, st.binary(min_size=1, max_size=10))
    doubles = st.lists(st.floats().map(lambda v: value(double_val=v).SerializeToString()))
    cells: list[bytes | None] = data.draw(doubles | st.lists(message | broken | st.none()))
    for cell, number in zip(cells, plain_numbers(cells).tolist(), strict=True):
        alone = read(cell) if cell else None
        if number == number:
            assert type(alone) in (int, float)
            assert bits([number]) == bits([float(alone)])
        elif cell and cell[0] in (0x20, 0x29):  # what is usual is not left to those who are slow
            assert not (type(alone) is int and 0 <= alone <= 2**53 and cell == value(int64_val=alone).SerializeToString())
            assert not (len(cell) == 9 and type(alone) is float and alone == alone)


FIELDS = {
    "usage": {"n": "float", "must": "float", "kind": "category"}, "more": {"n": "int", "flag": "bool"}, "place": {"n": "int"},
}


def stored(contract: ModelContract) -> dict[str, list[dict[str, Any]]]:
    """Rows of every kind. Ages differ, some are missing, some null, some of no use."""
    rng = random.Random(3)
    out: dict[str, list[dict[str, Any]]] = {}
    for view_of in contract.views:
        key = contract.entity(view_of.entity).join_key
        rows: list[dict[str, Any]] = []
        for i in range(300):
            age = timedelta(minutes=rng.choice([0, 30, 30, 30, 119, 121, 600, -10]))
            row: dict[str, Any] = {key: f"c{i}" if key == "card_id" else i - 150, "event_timestamp": NOW - age}
            for name, dtype in FIELDS[view_of.name].items():
                usual: Any = {"float": rng.uniform(-5, 100), "int": rng.randrange(101), "category": rng.choice(["x", "yy", "é"]),
                              "bool": rng.random() < 0.5}[dtype]
                strange: Any = {"float": [-6.0, 1e300, 0.0, -0.0, math.inf, None], "int": [-6, 2**40, 2**60, 0, None],
                                "category": ["z", "", None], "bool": [None]}[dtype]
                row[name] = usual if rng.random() < 0.85 else rng.choice(strange)
            rows.append(row)
        out[view_of.name] = [row for row in rows if rng.random() < 0.9]
    return out


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def reader(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, contract: ModelContract,
) -> Any:
    folder = tmp_path_factory.mktemp("columns")
    if request.param == "sqlite":
        make_feature_repo(folder / "repo", contract, stored(contract), numbered={"shop_id"})
        yield FeastReader(folder / "repo")
        return
    with Redis(folder) as server:
        make_feature_repo(folder / "repo", contract, stored(contract), redis=server.address, numbered={"shop_id"})
        yield FeastReader(folder / "repo")


def same_bits(a: Encoded, b: Encoded) -> bool:
    return a.matrix.dtype == b.matrix.dtype and np.where(np.isnan(a.matrix), np.float32(9e9), a.matrix).tobytes() == \
        np.where(np.isnan(b.matrix), np.float32(9e9), b.matrix).tobytes()


@pytest.mark.parametrize("count", [17, 64, ROWS_MAX + 1, 300])
async def test_rows_looked_up_and_encoded_by_columns_are_those_of_one_by_one(
    reader: FeastReader, contract: ModelContract, count: int,
) -> None:
    plan = make_plan(contract, reader.entity_types(make_plan(contract)))
    assert plan.entity_types == {"card_id": ENTITY_TEXT, "shop_id": ENTITY_NUMBER}
    store = reader.direct_store(rows_max=5000)
    assert isinstance(store, SqliteStore | RedisStore)
    rng = random.Random(count)
    features = {"amount": 20.5, "risk": 1, "count": 2, "clamped": 300, "kind": "x", "flag": True}
    rows = [{"entity": {"card_id": f"c{rng.randrange(320)}", "shop_id": rng.randrange(-155, 155)}, "event_time": NOW.isoformat(),
             "features": {**features, "amount": rng.uniform(0, 50)}} for _ in range(count)]
    batch = parsed_alike(plan, rows)[1].batch
    each = await store.read(plan, batch.entities, 10.0)
    found = await store.read_columns(plan, batch.entities, 10.0)
    assert repr([found.row(i) for i in range(count)]) == repr(each)
    for one in plan.views:
        item = each[0].get(one.features[0].column)
        assert found.time_of_first(plan, one) == (None if item is None else item[1])
    read, through_sdk = found.values.copy(), columns_of(plan, reader.read(plan, batch.entities))
    good = plan.plain.good(read)
    assert good.mean() > 0.6  # most were read by columns
    assert np.array_equal(np.where(good, read, 0.0), np.where(good, through_sdk.values, 0.0))
    assert not (good & ~plan.plain.good(through_sdk.values)).any()
    assert np.array_equal(np.where(good, found.times, 0.0), np.where(good, through_sdk.times, 0.0))
    one_by_one, columns = encode_each(plan, batch, each), encode_columns(plan, batch, found)
    assert columns.places == one_by_one.places
    assert columns.lacking == one_by_one.lacking
    assert {i: (e.detail, e.problems, e.features) for i, e in columns.errors.items()} == \
        {i: (e.detail, e.problems, e.features) for i, e in one_by_one.errors.items()}
    assert 0 < len(columns.errors) < count
    assert any(lacks.degraded for lacks in columns.lacking.values())
    assert same_bits(columns, one_by_one)
    store.close()


@settings(deadline=None)
@given(data=st.data())
def test_whatever_the_store_gave_is_encoded_alike_by_columns(plan: Plan, data: st.DataObject) -> None:
    batch = parsed_alike(plan, data.draw(rows_of(plan)))[1].batch
    if not len(batch):
        return
    numbers = st.floats(-5, 100) | st.integers(0, 100) | st.floats() | st.integers(-(2**63), 2**63)
    raw = numbers | st.sampled_from(["x", "yy", "no"]) | st.booleans()
    when = st.sampled_from([NOW_S, NOW_S - 60.0, NOW_S - 3600.0, NOW_S - 7200.0, NOW_S - 7200.5, NOW_S + 300.0, NOW_S + 301.0, 0.0])
    fits = {"float": st.floats(0, 100), "int": st.integers(0, 100), "category": st.sampled_from(["x", "yy"]), "bool": st.booleans()}
    usual = st.fixed_dictionaries({f.column: st.tuples(fits[f.feature.dtype], st.just(NOW_S - 60.0)) for f in plan.looked_up})
    anything = st.fixed_dictionaries({}, optional={f.column: st.tuples(raw, when) for f in plan.looked_up})
    found: list[Found] = data.draw(st.lists(usual | anything, min_size=len(batch), max_size=len(batch)))
    gone = data.draw(st.booleans())
    each = encode_each(plan, batch, [None] * len(batch) if gone else found)
    columns = encode_columns(plan, batch, None if gone else columns_of(plan, found))
    assert columns.places == each.places
    assert columns.lacking == each.lacking
    assert {i: (e.detail, e.problems) for i, e in columns.errors.items()} == {i: (e.detail, e.problems) for i, e in each.errors.items()}
    assert same_bits(columns, each)
