"""The hop's client reads a head that it knows no second time, and must make of every answer what it makes of it the first time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from hafnium_transformer.http_client import BrokenConnectionError, HttpAnswer, HttpClient, NotHttpError

PATIENCE_S = 10.0
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-model: a\r\n\r\n"
GOOD = HEAD + b"first"


class Scripted:
    """A server that gives its answers in turn, each in pieces that arrive by themselves."""

    def __init__(self, answers: Sequence[Sequence[bytes]]) -> None:
        self._answers = list(answers)
        self.connections = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                answer = self._answers.pop(0)
                for piece in answer:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.02 if len(answer) > 1 else 0.0)
        except (asyncio.IncompleteReadError, ConnectionError, IndexError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(*answers: Sequence[bytes]) -> AsyncIterator[tuple[Scripted, HttpClient]]:
    script = Scripted(answers)
    server = await asyncio.start_server(script.answer, "127.0.0.1", 0)
    script.port = server.sockets[0].getsockname()[1]
    client = HttpClient(f"127.0.0.1:{script.port}", tls=False, connection_age_s=60.0)
    try:
        yield script, client
    finally:
        client.close()
        server.close()
        await server.wait_closed()


async def asked(client: HttpClient) -> HttpAnswer:
    return await client.request("POST", "/", timeout_s=PATIENCE_S)


async def test_a_known_head_brings_its_own_body_each_time_on_one_connection() -> None:
    bodies = [b"first", b"other", b"third", b"\r\n\r\nx", b"HTTP/"]
    async with scripted(*[[HEAD + body] for body in bodies]) as (script, client):
        got = [await asked(client) for _ in bodies]
    assert [a.body for a in got] == bodies
    assert {a.status for a in got} == {200}
    assert all(dict(a.headers) == {"content-length": "5", "x-model": "a"} for a in got)
    assert script.connections == 1


@pytest.mark.parametrize("pieces", [
    [HEAD, b"other"], [HEAD + b"ot", b"her"], [HEAD[:20], HEAD[20:] + b"other"], [HEAD[:-2], b"\r\nother"],
    [b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"other"], [b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"other"],
])
async def test_an_answer_in_pieces_is_read_whole_before_and_after_its_head_is_known(pieces: list[bytes]) -> None:
    async with scripted(pieces, [GOOD], pieces, [GOOD]) as (script, client):
        assert [(await asked(client)).body for _ in range(4)] == [b"other", b"first", b"other", b"first"]
    assert script.connections == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_a_status_that_has_no_body_has_none_each_time(status: bytes) -> None:
    odd = HEAD.replace(b"200 OK", status).replace(b"content-length: 5", b"content-length: 2") + b"\r\n"
    async with scripted([odd], [odd]) as (_, client):
        assert [(await asked(client)).body for _ in range(2)] == [b"", b""]


async def test_what_follows_an_answer_ends_the_connection_though_the_head_is_known() -> None:
    async with scripted([GOOD], [GOOD + GOOD], [GOOD]) as (script, client):
        assert [(await asked(client)).body for _ in range(3)] == [b"first"] * 3
    assert script.connections == 2


async def test_a_head_that_ends_the_connection_ends_it_each_time() -> None:
    last = HEAD.replace(b"x-model: a", b"connection: close") + b"first"
    async with scripted([last], [last], [GOOD]) as (script, client):
        assert [(await asked(client)).body for _ in range(3)] == [b"first"] * 3
    assert script.connections == 3


async def test_chunks_are_counted_anew_each_time() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    async with scripted([head + b"3\r\nabc\r\n0\r\n\r\n"], [head + b"1\r\nd\r\n2\r\nef\r\n0\r\n\r\n"]) as (script, client):
        assert [(await asked(client)).body for _ in range(2)] == [b"abc", b"def"]
    assert script.connections == 1


async def test_a_known_head_with_less_behind_it_is_no_answer() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (GOOD, HEAD + b"fir"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    client = HttpClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", tls=False, connection_age_s=60.0)
    try:
        assert (await asked(client)).body == b"first"
        with pytest.raises(BrokenConnectionError):
            await asked(client)
    finally:
        client.close()
        server.close()


async def test_what_is_no_http_is_refused_behind_a_known_head_too() -> None:
    async with scripted([GOOD], [b"\x00\x01 rubbish\r\n\r\n"], [GOOD]) as (script, client):
        assert (await asked(client)).body == b"first"
        with pytest.raises(NotHttpError):
            await asked(client)
        assert (await asked(client)).body == b"first"
    assert script.connections == 2


async def test_more_heads_than_are_kept_are_still_read() -> None:
    answers = [[b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nx-at: %d\r\n\r\nb" % n] for n in range(300)]
    async with scripted(*answers) as (_, client):
        got = [(await asked(client)).headers["x-at"] for _ in range(300)]
    assert got == [str(n) for n in range(300)]
