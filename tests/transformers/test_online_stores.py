"""What is read directly is what Feast's own SDK reads, on SQLite and on Redis; and what happens when the store goes away."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hafnium_redis import Redis
from hafnium_servers import make_feature_repo, predictor, transformer
from redis import Redis as Client

from hafnium_contract.bundle import Bundle
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_testing import EVENT_TIME, synthetic_rows, synthetic_views
from hafnium_transformer.errors import DeadlineError, OverloadedError, UnavailableError
from hafnium_transformer.online_store.feast import FeastReader
from hafnium_transformer.online_store.records import Found, OnlineStore
from hafnium_transformer.online_store.redis import RedisAddress, RedisStore, parse_address
from hafnium_transformer.online_store.sqlite import SqliteStore
from hafnium_transformer.plan import ENTITY_NUMBER, Plan, make_plan

ENTITIES = 1000
SCORE = "/v1/score"


def views(contract: ModelContract, numbered: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows of every kind: all there, some missing, zero, negative, without any value; each entity with a time of its own."""
    rng = random.Random(7)
    made = synthetic_views(contract, seed=3, entities=ENTITIES)
    for view in contract.views:
        key = contract.entity(view.entity).join_key
        for i, row in enumerate(made[view.name]):
            row["event_timestamp"] = EVENT_TIME - timedelta(seconds=rng.randrange(10_000_000))
            for f in contract.features_of(view.name):
                name = f.source.field  # type: ignore[union-attr]
                if rng.random() < 0.1:
                    row[name] = None
                elif f.dtype == "float" and rng.random() < 0.2:
                    row[name] = rng.choice([0.0, -0.0, -1.5, 1e300, 5e-324, float("inf")])
                elif f.dtype == "int" and rng.random() < 0.2:
                    row[name] = rng.choice([0, -1, 2**40])
            if numbered:
                row[key] = i if i % 2 else -i
        made[view.name] = [row for row in made[view.name] if rng.random() > 0.15]  # and those of whom the store knows nothing
    return made


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module", params=["sqlite", "redis", "sqlite, numbers", "redis, numbers"])
def reader(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, contract: ModelContract,
) -> tuple[FeastReader, Plan, bool]:
    kind, _, numbered = str(request.param).partition(", ")
    path = tmp_path_factory.mktemp("stores") / "repo"
    address = None
    if kind == "redis":
        server: Redis = request.getfixturevalue("redis")
        address = f"{server.address},db={3 if numbered else 0}"
    make_feature_repo(path, contract, views(contract, bool(numbered)), redis=address, numbered=bool(numbered))
    made = FeastReader(path)
    types = made.entity_types(make_plan(contract))
    assert (set(types.values()) == {ENTITY_NUMBER}) == bool(numbered)
    return made, make_plan(contract, types), bool(numbered)


@pytest.fixture
async def store(reader: tuple[FeastReader, Plan, bool]) -> AsyncIterator[OnlineStore]:
    made = reader[0].direct_store(rows_max=5000)
    assert isinstance(made, SqliteStore | RedisStore)
    yield made
    made.close()


def same(a: Found, b: Found) -> bool:
    return a.keys() == b.keys() and all(
        type(a[k][0]) is type(b[k][0]) and (a[k] == b[k] or (a[k][0] != a[k][0] and b[k][0] != b[k][0])) for k in a
    ) and all(math.copysign(1, a[k][0]) == math.copysign(1, b[k][0]) for k in a if isinstance(a[k][0], float))


@pytest.mark.parametrize("together", [1, 7, 200])
async def test_1000_entities_have_the_values_and_times_that_feast_gives(
    reader: tuple[FeastReader, Plan, bool], store: OnlineStore, together: int,
) -> None:
    feast, plan, numbered = reader
    rng = random.Random(together)
    count = 100 if together == 1 else 1000

    def entity(key: str) -> str | int:
        i = rng.randrange(int(ENTITIES * 1.1))
        return (i if i % 2 else -i) if numbered else f"{key}-{i}"

    asked = [{key: entity(key) for key in plan.join_keys} for _ in range(count)]
    seen = 0
    for at in range(0, count, together):
        part = asked[at : at + together]
        direct, sdk = await store.read(plan, part, 10.0), feast.read(plan, part)
        assert len(direct) == len(part)
        for mine, theirs in zip(direct, sdk, strict=True):
            assert same(mine, theirs), (mine, theirs)
            seen += len(theirs)
    assert seen > count


async def test_a_text_that_is_no_ascii_is_its_own_entity(tmp_path: Path, contract: ModelContract) -> None:
    rows = synthetic_views(contract, seed=3, entities=3)
    names = ["é", "'; DROP TABLE x; --", "日本"]
    for view in contract.views:
        for row, name in zip(rows[view.name], names, strict=True):
            row[contract.entity(view.entity).join_key] = name
    make_feature_repo(tmp_path / "repo", contract, rows)
    feast = FeastReader(tmp_path / "repo")
    plan = make_plan(contract, feast.entity_types(make_plan(contract)))
    direct = feast.direct_store(rows_max=10)
    assert direct is not None
    asked = [dict.fromkeys(plan.join_keys, name) for name in names]
    assert await direct.read(plan, asked, 5.0) == feast.read(plan, asked)
    direct.close()


async def test_a_locked_file_is_read_when_it_is_free_or_the_time_is_over(repo: Path, contract: ModelContract) -> None:
    feast = FeastReader(repo)
    plan = make_plan(contract, feast.entity_types(make_plan(contract)))
    direct = feast.direct_store(rows_max=10)
    assert direct is not None
    asked = [{key: f"{key}-1" for key in plan.join_keys}]
    good = await direct.read(plan, asked, 5.0)
    writer = sqlite3.connect(repo / "online.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DeadlineError, match="locked"):
        await direct.read(plan, asked, 0.05)
    writer.execute("ROLLBACK")
    writer.close()
    assert await direct.read(plan, asked, 5.0) == good != [{}]
    direct.close()


async def test_a_file_that_was_replaced_is_noticed_and_a_broken_one_is_said(tmp_path: Path, contract: ModelContract) -> None:
    made = make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, seed=3, entities=3))
    del made
    feast = FeastReader(tmp_path / "repo")
    plan = make_plan(contract, feast.entity_types(make_plan(contract)))
    direct = feast.direct_store(rows_max=10)
    assert direct is not None
    asked = [{key: f"{key}-1" for key in plan.join_keys}]
    assert await direct.read(plan, asked, 5.0) != [{}]
    file = tmp_path / "repo" / "online.db"
    aside = file.rename(tmp_path / "aside.db")
    file.write_bytes(b"this is no database, and long enough for its header to be read" * 20)
    until = time.monotonic() + 30.0
    said = ""
    while not said and time.monotonic() < until:  # it looks at the file once in a second
        try:
            await direct.read(plan, asked, 5.0)
        except UnavailableError as e:
            said = str(e)
        await asyncio.sleep(0.05)
    assert "online.db" in said
    file.unlink()
    with pytest.raises(UnavailableError, match=r"online\.db"):
        await direct.read(plan, asked, 5.0)
    aside.rename(file)
    assert await direct.read(plan, asked, 5.0) != [{}]
    direct.close()


async def test_redis_with_a_password_and_too_many_rows(tmp_path: Path, contract: ModelContract) -> None:
    with Redis(tmp_path, "--requirepass", "s3cret") as server:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1, entities=3), redis=f"{server.address},password=s3cret")
        feast = FeastReader(tmp_path / "repo")
        plan = make_plan(contract, feast.entity_types(make_plan(contract)))
        asked = [{key: f"{key}-1" for key in plan.join_keys}]
        direct = feast.direct_store(rows_max=2)
        assert isinstance(direct, RedisStore)
        assert await direct.read(plan, asked, 5.0) == feast.read(plan, asked) != [{}]
        with pytest.raises(OverloadedError):
            await direct.read(plan, asked * 3, 5.0)
        direct.close()
        wrong = RedisStore(RedisAddress("127.0.0.1", server.port, password="other"), "p", rows_max=9)
        with pytest.raises(UnavailableError, match="refused"):
            await wrong.read(plan, asked, 5.0)
        wrong.close()


async def test_a_key_of_another_type_is_an_entity_without_values_and_costs_the_others_nothing(
    redis: Redis, tmp_path: Path, contract: ModelContract,
) -> None:
    address = f"{redis.address},db=5"
    make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1), redis=address)
    feast = FeastReader(tmp_path / "repo")
    plan = make_plan(contract, feast.entity_types(make_plan(contract)))
    store = feast.direct_store(rows_max=100)
    assert isinstance(store, RedisStore)
    asked = [r["entity"] for r in synthetic_rows(contract, 3, seed=0)]
    assert len({str(a) for a in asked}) == 3
    right = await store.read(plan, asked, 20.0)
    assert all(right)
    client = Client(port=redis.port, db=5)
    spoilt = [k for k in client.keys("*") for value in asked[1].values() if str(value).encode() in k]
    for key in spoilt:
        client.delete(key)
        client.set(key, "somebody else's")
    assert spoilt
    try:
        found = await store.read(plan, asked, 20.0)
        assert [same(a, b) for a, b in zip(found, [right[0], {}, right[2]], strict=True)] == [True] * 3
        columns = await store.read_columns(plan, asked, 20.0)
        assert [same(columns.row(i), one) for i, one in enumerate(found)] == [True] * 3
        assert [math.isnan(t) for t in columns.times[0]] == [False, True, False]
    finally:
        store.close()
        client.close()


async def test_redis_that_hangs_dies_or_was_never_there(tmp_path: Path, contract: ModelContract) -> None:
    with Redis(tmp_path) as server:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1, entities=3), redis=server.address)
        feast = FeastReader(tmp_path / "repo")
        plan = make_plan(contract, feast.entity_types(make_plan(contract)))
        asked = [{key: f"{key}-1" for key in plan.join_keys}]
        direct = feast.direct_store(rows_max=9)
        assert direct is not None
        good = await direct.read(plan, asked, 5.0)
        server.stall()
        with pytest.raises(DeadlineError):
            await direct.read(plan, asked, 0.1)
        server.go_on()
        assert await direct.read(plan, asked, 5.0) == good
        server.kill()
        with pytest.raises(UnavailableError, match="can't be reached"):
            await direct.read(plan, asked, 5.0)
        with server:  # again, empty
            assert await direct.read(plan, asked, 5.0) == [{}]
        direct.close()


@pytest.mark.parametrize(("given", "expected"), [
    ("redis:6379", RedisAddress("redis", 6379)),
    ("redis:6379,db=2,ssl=true,username=u,password=p=q", RedisAddress("redis", 6379, 2, "u", "p=q", tls=True)),
    ('redis:6379,password="quoted"', RedisAddress("redis", 6379, password="quoted")),
])
def test_connection_strings_are_read_as_feast_reads_them(given: str, expected: RedisAddress) -> None:
    assert parse_address(given) == expected


async def test_a_connection_that_goes_silent_is_given_up_however_little_time_each_caller_has(
    tmp_path: Path, contract: ModelContract,
) -> None:
    """A node that died closes nothing: what is sent to it vanishes, until somebody connects anew."""
    pumps: list[asyncio.Task[None]] = []
    kept: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            writer.write(part)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", server.port)
        pumps.extend(asyncio.create_task(pump(a, b)) for a, b in ((reader, to_there), (there, writer)))
        kept.extend((writer, to_there))

    with Redis(tmp_path) as server:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1, entities=3), redis=server.address)
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as between:
            config = tmp_path / "repo" / "feature_store.yaml"
            config.write_text(config.read_text().replace(server.address, f"127.0.0.1:{between.sockets[0].getsockname()[1]}"))
            feast = FeastReader(tmp_path / "repo")
            plan = make_plan(contract, feast.entity_types(make_plan(contract)))
            asked = [{key: f"{key}-1" for key in plan.join_keys}]
            direct = feast.direct_store(rows_max=9)
            assert isinstance(direct, RedisStore)
            good = await direct.read(plan, asked, 5.0)
            assert good != [{}]
            for task in pumps:
                task.cancel()
            opened, found = len(pumps), None
            until = time.monotonic() + 60.0
            while found is None and time.monotonic() < until:
                with contextlib.suppress(DeadlineError):
                    found = await direct.read(plan, asked, 0.03)
            assert found == good
            assert len(pumps) > opened
            direct.close()
            for task in pumps:
                task.cancel()
            for writer in kept:
                writer.close()


@pytest.mark.parametrize("silent", [1, 2])
async def test_a_caller_with_time_left_tries_again_where_nobody_answers_a_new_connection(
    tmp_path: Path, contract: ModelContract, silent: int,
) -> None:
    """As many connections as `silent` are accepted and never answered, as by a node that stalls; then Redis is there."""
    accepted: list[asyncio.StreamWriter] = []
    pumps: list[asyncio.Task[None]] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(65536):
            writer.write(part)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        if len(accepted) > silent:
            there, to_there = await asyncio.open_connection("127.0.0.1", server.port)
            pumps.extend(asyncio.create_task(pump(a, b)) for a, b in ((reader, to_there), (there, writer)))
            accepted.append(to_there)

    with Redis(tmp_path) as server:
        make_feature_repo(tmp_path / "repo", contract, synthetic_views(contract, 1, entities=3), redis=server.address)
        feast = FeastReader(tmp_path / "repo")
        plan = make_plan(contract, feast.entity_types(make_plan(contract)))
        asked = [{key: f"{key}-1" for key in plan.join_keys}]
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as between:
            config = tmp_path / "repo" / "feature_store.yaml"
            config.write_text(config.read_text().replace(server.address, f"127.0.0.1:{between.sockets[0].getsockname()[1]}"))
            direct = FeastReader(tmp_path / "repo").direct_store(rows_max=9)
            assert direct is not None
            if silent == 1:
                assert await direct.read(plan, asked, 60.0) == feast.read(plan, asked) != [{}]
            else:
                with pytest.raises(UnavailableError, match="no answer within 1 s of connecting"):
                    await direct.read(plan, asked, 60.0)
            direct.close()
            for task in pumps:
                task.cancel()
            for writer in accepted:
                writer.close()


@pytest.mark.parametrize("given", [
    "redis", "a:1,b:2", "redis:6379,db=x", "redis:6379,skip_full_coverage_check=true,password=s3cret", "",
    "redis:6379,password=s3cret,0ther", "redis:6379,password=0ther,s3cret=1", "redis:6379,password=a,db=s3cret",
])
def test_other_connection_strings_are_refused_without_their_password(given: str) -> None:
    with pytest.raises(InputError) as e:
        parse_address(given)
    assert "s3cret" not in str(e.value)


@pytest.mark.slow
def test_scores_go_on_by_the_policy_while_redis_is_gone_and_recover_with_it(
    bundle: Bundle, contract: ModelContract, tmp_path: Path,
) -> None:
    rows = synthetic_rows(contract, 5, seed=0)
    patient = ["--deadline_ms", "20000", "--lookup_timeout_ms", "300"]
    with Redis(tmp_path) as server:
        made = synthetic_views(contract, 1)
        make_feature_repo(tmp_path / "repo", contract, made, redis=server.address)
        with predictor(bundle.path, tmp_path) as behind, transformer(behind.port, tmp_path, repo=tmp_path / "repo", args=patient) as front:
            behind.wait()
            front.wait()
            before = [front.post(SCORE, row).json for row in rows]
            assert not any(answer["degraded"] for answer in before)
            server.stall()
            slow = [front.post(SCORE, row) for row in rows]
            assert {r.status for r in slow} <= {200, 503}  # as each view's policy says
            assert all(r.json["degraded"] for r in slow if r.status == 200)
            began = time.monotonic()
            for _ in range(20):  # by now it is not asked every time
                front.post(SCORE, rows[0])
            assert time.monotonic() - began < 20 * 0.3
            assert front.get("/health/ready").status == 200
            server.go_on()
            until = time.monotonic() + 20.0
            while time.monotonic() < until:
                after = [front.post(SCORE, row).json for row in rows]
                if after == before:
                    break
                time.sleep(0.1)
            assert after == before


def test_opens_without_the_offline_store_that_only_training_needs(
    repo: Path, contract: ModelContract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = tmp_path / "repo"
    shutil.copytree(repo, trained)
    config = trained / "feature_store.yaml"
    config.write_text(config.read_text().replace("offline_store: {type: file}", "offline_store: {type: duckdb}"))
    assert "duckdb" in config.read_text()
    monkeypatch.setitem(sys.modules, "feast.infra.offline_stores.duckdb", None)  # as in the transformer's image: not to be had
    reader = FeastReader(trained)
    plan = make_plan(contract, reader.entity_types(make_plan(contract)))
    found = reader.read(plan, [{key: f"{key}-1" for key in plan.join_keys}])
    assert found[0]


@pytest.mark.parametrize("text", [
    "a: [", "just text", "project: p", "online_store: {type: nobodys}\nproject: p\nregistry: r\nprovider: local",
])
def test_configuration_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "feature_store.yaml").write_text(text)
    with pytest.raises(InputError, match=r"feature_store\.yaml: not a Feast configuration"):
        FeastReader(tmp_path)
