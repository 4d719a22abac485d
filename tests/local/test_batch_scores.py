"""`hafnium score`: rows of a file to scores, a bad row costs only itself."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer

from hafnium_contract.contract_file import load_contract, parse_contract
from hafnium_contract.errors import InputError, Problem
from hafnium_local import batch_scores
from hafnium_local.batch_scores import ROWS_AGAIN_S, read_rows, score_file, score_rows
from hafnium_training.replay_requests import score_requests
from hafnium_transformer.errors import LookedUpError, RowInvalidError, StoreSilentError

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_jsonl_in_jsonl_out_in_order_with_each_rows_error(backend: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    amounts: list[Any] = [1, "bad", 3, 4, 5]
    source.write_text("".join(json.dumps({"request_id": f"q{i}", "features": {"amount": a}}) + "\n" for i, a in enumerate(amounts)))
    done: list[int] = []
    summary = score_file(backend().url, source, tmp_path / "out.jsonl", batch_rows=2, on_rows=done.append)
    assert (summary.rows, summary.scored, summary.refused) == (5, 4, 1)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(f["row"], f["request_id"], f.get("score"), f["error"]) for f in found] == [
        (0, "q0", 0.5, None), (1, "q1", None, "422: amount: expected a number"), (2, "q2", 0.5, None), (3, "q3", 0.5, None),
        (4, "q4", 0.5, None),
    ]
    assert done == [1, 2, 3, 4, 5]


def test_csv_with_prefixed_columns(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("request_id,event_time,entity.customer_id,features.amount\na,2026-01-02 03:04:05,c1,2.5\nb,,c2,\n")
    assert list(read_rows(tmp_path / "rows.csv")) == [
        {"request_id": "a", "event_time": "2026-01-02T03:04:05+00:00", "entity": {"customer_id": "c1"}, "features": {"amount": 2.5}},
        {"request_id": "b", "entity": {"customer_id": "c2"}, "features": {}},
    ]
    score_file(backend().url, tmp_path / "rows.csv", tmp_path / "out.csv")
    found = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(f["row"], f["request_id"], f["score"], f["error"]) for f in found] == [("0", "a", "0.5", ""), ("1", "b", "0.5", "")]


def test_table_by_contract_takes_its_columns_and_leaves_the_label(tmp_path: Path) -> None:
    contract = load_contract(EXAMPLES / "creditcard" / "contract.yaml")
    fields = sorted(contract.request_fields)
    columns = {f: [1.5, None] for f in fields} | {contract.data.label.column: [0, 1], "Other": ["x", "y"]}
    if contract.data.event_time.column not in columns:
        columns[contract.data.event_time.column] = [0.0, 60.0]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet", contract)
    assert set(first["features"]) == set(fields)
    assert second["features"] == {}
    assert first["entity"] == {}


@pytest.mark.parametrize(("names", "asked"), [(("5411", "7995"), "5411"), (("5411.0", "7995.0"), "5411.0")], ids=["whole", "fractions"])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_category_is_asked_for_as_the_contract_writes_it(tmp_path: Path, names: tuple[str, ...], asked: str, ending: str) -> None:
    written = yaml.safe_load((EXAMPLES / "unified-risk" / "contract.yaml").read_text())
    column, kind = next((name, f) for name, f in parse_contract(written).request_fields.items() if f.dtype == "category")
    next(f for f in written["features"] if f["name"] == kind.name)["categories"] = list(names)
    contract, file = parse_contract(written), tmp_path / f"rows{ending}"
    table = pa.table({column: [5411.0, None]})
    pq.write_table(table, file) if ending == ".parquet" else file.write_text(f"{column},x\n5411.0,\n,1\n")
    assert [row["features"] for row in read_rows(file, contract)] == [{column: asked}, {}]


def test_entities_times_and_types_follow_the_contract(tmp_path: Path) -> None:
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    by_type = {f.dtype: name for name, f in contract.request_fields.items()}
    keys = [e.join_key for e in contract.entities]
    when = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    columns: dict[str, list[Any]] = {k: [7] for k in keys} | {contract.data.event_time.column: [when]}
    columns |= {by_type["float"]: [2.0]} | ({by_type["bool"]: [1]} if "bool" in by_type else {})
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet", contract)
    assert row["entity"] == dict.fromkeys(keys, "7")
    assert row["event_time"] == "2026-01-02T03:04:00+00:00"
    assert row["features"][by_type["float"]] == 2.0
    if "bool" in by_type:
        assert row["features"][by_type["bool"]] is True


async def _serve(answer: Any) -> TestServer:
    app = web.Application(client_max_size=10**8)

    async def handle(request: web.Request) -> web.Response:
        return answer((await request.json())["requests"])

    app.router.add_post("/v1/score/batch", handle)
    server = TestServer(app)
    await server.start_server()
    return server


async def _all(url: str, count: int) -> list[dict[str, Any]]:
    return [r async for r in score_rows(url, [(i, {"request_id": str(i), "features": {}}) for i in range(count)])]


async def test_batch_that_is_too_large_is_halved_until_it_fits() -> None:
    sizes: list[int] = []

    def answer(requests: list[Any]) -> web.Response:
        sizes.append(len(requests))
        if len(requests) > 2:
            return web.json_response({"title": "too large"}, status=413)
        return web.json_response({"results": [{"request_id": r["request_id"], "score": 0.1} for r in requests]})

    server = await _serve(answer)
    found = await _all(str(server.make_url("/")), 7)
    await server.close()
    assert [f["request_id"] for f in found] == [str(i) for i in range(7)]
    assert max(sizes) == 7


async def test_refusal_of_the_whole_batch_is_every_rows_error() -> None:
    fields = {"title": "t", "errors": [{"path": "features.a", "message": "missing"}]}
    server = await _serve(lambda _: web.json_response(fields, status=422))
    found = await _all(str(server.make_url("/v1/score")), 2)
    await server.close()
    assert [f["error"] for f in found] == ["422: features.a: missing"] * 2


async def test_answer_of_another_form_is_a_clear_error() -> None:
    server = await _serve(lambda _: web.json_response({"results": []}))
    with pytest.raises(InputError, match="is this a Hafnium transformer"):
        await _all(str(server.make_url("/")), 2)
    await server.close()


async def test_a_limit_for_the_moment_is_waited_for_as_long_as_it_says() -> None:
    times: list[float] = []

    def answer(requests: list[Any]) -> web.Response:
        times.append(time.monotonic())
        if len(times) == 2:
            return web.json_response({"title": "too many rows"}, status=429, headers={"Retry-After": "1"})
        return web.json_response({"results": [{"request_id": r["request_id"], "score": 0.1} for r in requests]})

    server = await _serve(answer)
    requests = [(i, {"request_id": str(i), "features": {}}) for i in range(6)]
    found = [r async for r in score_rows(str(server.make_url("/")), requests, batch_rows=2)]
    await server.close()
    assert [(f["request_id"], f["error"]) for f in found] == [(str(i), None) for i in range(6)]
    assert len(times) == 4
    assert times[2] - times[1] >= 1.0


async def test_a_limit_that_lasts_beyond_the_deadline_is_each_rows_error() -> None:
    server = await _serve(lambda _: web.json_response({"detail": "20 rows a day"}, status=429, headers={"Retry-After": "86400"}))
    found = await _all(str(server.make_url("/")), 2)
    await server.close()
    assert [f["error"] for f in found] == ["429: 20 rows a day"] * 2


def _silent() -> dict[str, Any]:
    return StoreSilentError("view v: v.f could not be looked up", [Problem("v.f", "could not be looked up")]).document()


def _lacking() -> dict[str, Any]:
    return LookedUpError("view v: v.f has no value for customer_id 'c'", [Problem("v.f", "has no value for customer_id 'c'")]).document()


async def _by_turn(errors: list[dict[int, dict[str, Any]]], count: int, batch_rows: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Results, and the rows of each batch. `errors`: problems by row, for the first batches; the last holds for all that follow."""
    asked: list[list[int]] = []

    def answer(requests: list[Any]) -> web.Response:
        asked.append([int(r["request_id"]) for r in requests])
        now = errors[min(len(asked), len(errors)) - 1]
        return web.json_response({"results": [now.get(i) or {"request_id": str(i), "score": 0.1} for i in asked[-1]]})

    server = await _serve(answer)
    rows = [(i, {"request_id": str(i), "features": {}}) for i in range(count)]
    found = [r async for r in score_rows(str(server.make_url("/")), rows, batch_rows=batch_rows)]
    await server.close()
    assert [f["row"] for f in found] == list(range(count))
    return found, asked


async def test_rows_whose_store_did_not_answer_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_scores, "ROWS_AGAIN_S", (0.05, 0.1))
    refused = RowInvalidError([Problem("features.a", "missing")]).document()
    found, asked = await _by_turn([{1: _silent(), 2: refused, 3: _silent()}, {3: _silent()}], 4, 4)
    assert asked == [[0, 1, 2, 3], [1, 3], [3]]
    assert [f["error"] for f in found] == [None, None, "422: features.a: missing", "503: v.f: could not be looked up"]


async def test_a_row_that_the_store_lacks_costs_no_second_request_and_no_pause() -> None:
    started = time.monotonic()
    found, asked = await _by_turn([{1: _lacking(), 4: _lacking()}], 6, 2)
    assert asked == [[0, 1], [2, 3], [4, 5]]
    assert [i for i, f in enumerate(found) if f["error"]] == [1, 4]
    assert found[1]["error"] == "503: v.f: has no value for customer_id 'c'"
    assert time.monotonic() - started < ROWS_AGAIN_S[0]


async def test_rows_that_wait_for_another_turn_hold_no_others_up_until_too_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_scores, "HELD_ROWS_MAX", 4)
    monkeypatch.setattr(batch_scores, "ROWS_AGAIN_S", (0.2, 0.2))
    found, asked = await _by_turn([{0: _silent()}, {}], 8, 2)
    assert asked == [[0, 1], [2, 3], [0], [4, 5], [6, 7]]
    assert not [f for f in found if f["error"]]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("rows.csv", "amount\n1\n", "column 'amount': without a contract"), ("rows.txt", "", "expected a .jsonl, .csv or .parquet"),
    ("rows.parquet", "no parquet", "can't be read"), ("rows.csv", "", "can't be read"),
    ("rows.csv", "request_id,features.a,features.a\n1,2,3\n", "the header names a column twice: features.a"),
])
def test_input_that_is_wrong_is_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_rows(tmp_path / name))


def test_table_without_any_field_of_the_contract_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x\n1\n")
    with pytest.raises(InputError, match="none of its columns is a request field"):
        list(read_rows(tmp_path / "rows.csv", load_contract(EXAMPLES / "creditcard" / "contract.yaml")))


def test_output_that_cannot_be_written_leaves_nothing(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"features": {}}\n')
    url = backend().url
    with pytest.raises(InputError, match="can't be written"):
        score_file(url, tmp_path / "rows.jsonl", tmp_path / "no" / "out.jsonl")
    with pytest.raises(InputError, match=r"expected a .jsonl or .csv"):
        score_file(url, tmp_path / "rows.jsonl", tmp_path / "out.xml")
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(InputError):
        score_file(url, tmp_path / "bad.jsonl", tmp_path / "out.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "bad.jsonl"}


def test_scores_go_to_a_stream(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"features": {}}\n')
    out = io.StringIO()
    assert score_file(backend().url, tmp_path / "rows.jsonl", out).scored == 1
    assert json.loads(out.getvalue())["score"] == 0.5


def test_address_that_is_no_address_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must begin with http"):
        asyncio.run(_all("localhost:1", 1))


def test_keys_dates_and_infinities_go_out_as_training_reads_them(tmp_path: Path) -> None:
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    keys = sorted({e.join_key for e in contract.entities})
    number = next(k for k, f in contract.request_fields.items() if f.dtype == "float")
    time = contract.data.event_time.column
    pq.write_table(pa.table({k: [12.0, None] for k in keys} | {number: [float("inf"), 2.0], time: ["2026-01-31", "2026-02-01"]}),
                   tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet", contract)
    assert first["entity"] == dict.fromkeys(keys, "12")
    assert first["features"] == {}
    assert first["event_time"] == "2026-01-31T00:00:00+00:00"
    assert second == {"entity": {}, "features": {number: 2.0}, "event_time": "2026-02-01T00:00:00+00:00"}


def test_rows_of_a_time_only(backend: Any, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    days = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00"]
    source.write_text("".join(json.dumps({"event_time": d, "features": {"amount": 1}}) + "\n" for d in days))
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    url = backend().url
    assert score_file(url, source, tmp_path / "a.jsonl", since=moment).rows == 2
    assert score_file(url, source, tmp_path / "b.jsonl", until=moment).rows == 1
    rows = [json.loads(line)["row"] for name in ("a.jsonl", "b.jsonl") for line in (tmp_path / name).read_text().splitlines()]
    assert rows == [1, 2, 0], "rows of the file, so that they can be put back to it"
    source.write_text('{"features": {}}\n')
    with pytest.raises(InputError, match="row 0: event_time None"):
        score_file(url, source, tmp_path / "c.jsonl", since=moment)


RISK_CSV = "transaction_id,event_time,customer_id,terminal_id,transaction_amount,merchant_category,channel,device_is_new,geo_risk_score\n"


def _risk_csv(tmp_path: Path, *rows: str) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text(RISK_CSV + "".join(f"{r}\n" for r in rows))
    return file


def _comparable(rows: Any) -> list[dict[str, Any]]:
    return [{**r, "event_time": datetime.fromisoformat(r["event_time"])} for r in rows]


def test_a_csv_goes_out_as_training_and_replay_read_it(tmp_path: Path) -> None:
    """Leading zeros, blanks, NA, 22 digits and fractions that come late: a reader that guesses types changes all of them."""
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    whole = [f"0{i:06d},2026-01-01 00:00:00,t,t,{i},fuel,chip,1,0" for i in range(1, 30_000)]
    file = _risk_csv(
        tmp_path, "0900123,2026-01-01,00042,7.0,5,0763,chip,True,0",
        "0900124,2026-01-01T00:00:00.5+01:00,4929000000000000001234,8.0,1,,NA,,NA",
        "0900125,2026-01-01T00:00:00Z,,9.0, 1e3 ,5411.0,nan,0,inf", *(r.replace(",t,t,", ",t,1.0,") for r in whole),
        "0900126,2026-01-02,t,,12.5,fuel,chip,false,NaN")
    found = _comparable(read_rows(file, contract))
    # oldest first there
    assert sorted(found, key=lambda r: r["event_time"]) == _comparable(score_requests(contract, file))
    assert found[0]["entity"] == {"customer_id": "00042", "terminal_id": "7"}
    assert (found[0]["request_id"], found[0]["features"]["merchant_category"]) == ("0900123", "0763")
    assert found[1]["features"] == {"transaction_amount": 1.0, "channel": "NA"}
    assert found[-1]["features"]["transaction_amount"] == 12.5


def test_a_cell_that_is_no_number_costs_its_row_alone(tmp_path: Path) -> None:
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    file = _risk_csv(tmp_path, *(f"{i},2026-01-01,c,t,{a},fuel,chip,{b},0" for i, (a, b) in enumerate([(1, 1), ("1_000", "yes"), (2, 0)])))
    assert [(r["features"]["transaction_amount"], r["features"]["device_is_new"]) for r in read_rows(file, contract)] == [
        (1.0, True), ("1_000", "yes"), (2.0, False)]


def test_a_malformed_line_is_told_before_the_first_row(tmp_path: Path) -> None:
    contract = load_contract(EXAMPLES / "unified-risk" / "contract.yaml")
    file = _risk_csv(tmp_path, *(f"{i},2026-01-01,c,t,1,fuel,chip,1,0" for i in range(60_000)), "x,2026-01-01")
    with pytest.raises(InputError, match="Expected 9 columns, got 2"):
        next(read_rows(file, contract))


@pytest.mark.parametrize("text", ["99999999999999", "1e300", "-4e9"])
def test_a_time_outside_of_all_years_is_told_with_its_unit(tmp_path: Path, text: str) -> None:
    contract = load_contract(EXAMPLES / "creditcard" / "contract.yaml")
    (tmp_path / "rows.csv").write_text(f"Time,Amount\n{text},1\n")
    with pytest.raises(InputError, match=r"rows.csv: column Time: expected a moment from 1970 to 2200, got .* \(unit s, origin 2013-09-01"):
        list(read_rows(tmp_path / "rows.csv", contract))


def test_without_a_contract_a_feature_is_a_number_where_the_whole_column_holds_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("request_id,entity.id,features.code,features.amount,features.new\n007,00042,0763,1,true\n8,9,5411,NaN,\n9,,,12.5,False\n")
    assert list(read_rows(file)) == [
        {"request_id": "007", "entity": {"id": "00042"}, "features": {"code": "0763", "amount": 1.0, "new": True}},
        {"request_id": "8", "entity": {"id": "9"}, "features": {"code": "5411"}},
        {"request_id": "9", "entity": {}, "features": {"amount": 12.5, "new": False}},
    ]


@pytest.mark.parametrize(("cell", "value"), [
    (".5", 0.5), ("5.", 5.0), ("+1.5", 1.5), (" 1.5", 1.5), ("-1E+3 ", -1000.0), ("-0.0", 0.0), ("inf", None), ("-Infinity", None),
    ("N/A", None), ("null", None), ("-nan", None), ("NAN", None), (" NA ", None), ("None", None), ("  ", None),
])
def test_without_a_contract_no_way_to_write_a_number_or_none_makes_texts_of_its_column(
    tmp_path: Path, cell: str, value: float | None,
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"request_id,features.amount\na,12.5\nb,{cell}\n")
    assert [r["features"] for r in read_rows(file)] == [{"amount": 12.5}, {} if value is None else {"amount": value}]


@pytest.mark.parametrize("cell", ["007", "-01", "1_000", "0x1f", "1,5", "e5", ".", "١", "1 2", "nano", "none", "NONE", "na", "#N/A"])
def test_without_a_contract_a_cell_that_is_no_number_leaves_its_column_text(tmp_path: Path, cell: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f'request_id,features.code\na,12\nb,"{cell}"\n')
    assert [r["features"]["code"] for r in read_rows(file)] == ["12", cell]


def test_without_a_contract_a_column_without_a_number_is_text_whatever_its_words_are(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        "entity.c,features.discount,features.grade,features.country,features.amount\n1,none,1,NA,5\n2,none,none,NA,NA\n3,NONE,2,,7\n")
    assert [r["features"] for r in read_rows(file)] == [
        {"discount": "none", "grade": "1", "country": "NA", "amount": 5.0}, {"discount": "none", "grade": "none", "country": "NA"},
        {"discount": "NONE", "grade": "2", "amount": 7.0}]


def test_without_a_contract_a_column_of_nan_alone_is_one_of_numbers_that_are_all_missing(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("entity.c,features.income,features.limit,features.word\n1,nan,NaN,nan\n2,,-NAN,x\n3,nan,NA,nan\n")
    assert [r["features"] for r in read_rows(file)] == [{"word": "nan"}, {"word": "x"}, {"word": "nan"}]


def test_without_a_contract_true_and_false_may_be_mixed_with_digits_and_gaps(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("request_id,features.new,features.word\n" + "".join(
        f"{i},{a},{b}\n" for i, (a, b) in enumerate([("true", "true"), ("0", "maybe"), ("NA", "NA"), (" FALSE", "0"), ("1", "")])))
    assert [r["features"] for r in read_rows(file)] == [
        {"new": True, "word": "true"}, {"new": False, "word": "maybe"}, {"word": "NA"}, {"new": False, "word": "0"}, {"new": True}]


NO_TIME = ["NAN", "-nan", "+nan", "NA", " n/a ", "None", ""]


@pytest.mark.parametrize("cell", NO_TIME)
def test_a_time_that_is_missing_is_left_out_whatever_says_so(tmp_path: Path, cell: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"Time,Amount\n0,1\n{cell},1\n")
    assert ["event_time" in r for r in read_rows(file, load_contract(EXAMPLES / "creditcard" / "contract.yaml"))] == [True, False]
    file.write_text(f"event_time,features.a\n2026-01-01,1\n{cell},1\n")
    assert ["event_time" in r for r in read_rows(file)] == [True, False]
    file = _risk_csv(tmp_path, f"1,{cell},c,t,1,fuel,chip,1,0", "2,soon,c,t,1,fuel,chip,1,0")
    assert [r.get("event_time") for r in read_rows(file, load_contract(EXAMPLES / "unified-risk" / "contract.yaml"))] == [None, "soon"]


@pytest.mark.parametrize("text", ["inf", "-Infinity"])
def test_a_time_without_end_is_told_with_its_unit(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text(f"Time,Amount\n{text},1\n")
    with pytest.raises(InputError, match=r"column Time: expected a moment from 1970 to 2200, got"):
        list(read_rows(tmp_path / "rows.csv", load_contract(EXAMPLES / "creditcard" / "contract.yaml")))
