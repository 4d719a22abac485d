"""A supervised child: started, restarted, stopped, and gone when its supervisor is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hafnium_contract.lifeline import tied_to_parent
from hafnium_local import processes
from hafnium_local.probes import Probe, ask
from hafnium_local.processes import Child, ProcessSpec, kill_leftovers, last_lines, merged, restart_delay_s


def python(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-c", code, *args)


@contextlib.asynccontextmanager
async def running(spec: ProcessSpec, folder: Path) -> AsyncIterator[Child]:
    child = Child(spec, folder / "logs" / f"{spec.name}.log", folder, lambda _: None)
    task = asyncio.create_task(child.run())
    try:
        yield child
    finally:
        child.stop()
        await asyncio.wait({task}, timeout=30)
        task.cancel()
        child.kill()


async def until(holds: Any) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


def test_first_restart_is_at_once_and_later_ones_wait_longer_up_to_a_cap() -> None:
    assert [restart_delay_s(n) for n in (0, 1, 2, 3, 4, 50)] == [0.0, 0.0, 0.25, 0.5, 1.0, 10.0]


async def test_process_that_ends_is_started_again_and_its_reason_is_kept(tmp_path: Path) -> None:
    async with running(ProcessSpec("x", python("print('no weights'); raise SystemExit(7)")), tmp_path) as child:
        await until(lambda: child.state.restarts >= 2)
        assert child.state.last_exit == "ended with status 7; last lines: no weights | no weights" or "status 7" in child.state.last_exit
    assert child.state.message == "stopped"


async def test_killed_process_names_the_signal(tmp_path: Path) -> None:
    async with running(ProcessSpec("x", python("import time; time.sleep(300)")), tmp_path) as child:
        await until(lambda: child.state.pid)
        os.kill(child.state.pid or 0, signal.SIGSEGV)
        await until(lambda: child.state.restarts == 1)
        assert child.state.last_exit == "killed by SIGSEGV"


async def test_program_that_does_not_exist_is_a_message_and_not_an_end(tmp_path: Path) -> None:
    async with running(ProcessSpec("x", ("/no/such/program",)), tmp_path) as child:
        await until(lambda: child.state.restarts >= 1)
        assert "can't start /no/such/program" in child.state.message


async def test_stop_asks_first_and_kills_after_the_grace(tmp_path: Path, tools: Any) -> None:
    stubborn = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(300)"
    spec = ProcessSpec("x", python(stubborn), grace_s=0.3)
    async with running(spec, tmp_path) as child:
        await until(lambda: last_lines(child.log, 1) == ["up"])
        pid = child.state.pid
    assert pid is not None
    assert not tools.alive(pid)


async def test_what_a_process_started_ends_with_it(tmp_path: Path, tools: Any) -> None:
    code = "import subprocess,time; p=subprocess.Popen(['sleep','300']); print(p.pid); time.sleep(300)"
    async with running(ProcessSpec("x", python(code)), tmp_path) as child:
        await until(lambda: last_lines(child.log, 1))
        grandchild = int(last_lines(child.log, 1)[0])
        assert tools.alive(grandchild)
    await until(lambda: not tools.alive(grandchild))


async def test_a_part_that_crashes_is_started_again_though_its_workers_hold_the_port_a_little_longer(tmp_path: Path, tools: Any) -> None:
    """The worker here has so much memory to give back that it outlives the signal that ends it by tens of milliseconds."""
    port = tools.free_port()
    code = (
        "import os,socket,sys,time\n"
        "s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "worker = os.fork() == 0\n"
        "kept = b'x' * (400 << 20 if worker else 1)\n"
        "print('holds', flush=True)\n"
        "time.sleep(300)\n"
    )
    spec = ProcessSpec("x", python(code, str(port)), probe=Probe("127.0.0.1", port, None))
    messages: list[str] = []
    child = Child(spec, tmp_path / "x.log", tmp_path, lambda c: messages.append(c.state.message))
    task = asyncio.create_task(child.run())
    try:
        await until(lambda: child.state.ready and len(last_lines(child.log, 3)) == 2)
        crashed = child.state.pid or 0
        os.kill(crashed, signal.SIGSEGV)
        await until(lambda: child.state.pid not in (None, crashed) and child.state.ready)
        assert child.state.restarts == 1
        assert not [m for m in messages if "is taken" in m]
    finally:
        child.stop()
        await task


async def test_input_is_closed_and_environment_is_passed(tmp_path: Path) -> None:
    code = "import os,sys,time; print(repr(sys.stdin.read()), os.environ['A'], os.environ['HAFNIUM_SUPERVISED_BY']); time.sleep(300)"
    async with running(ProcessSpec("x", python(code), env=merged({"A": "0"}, {"A": "1"})), tmp_path) as child:
        await until(lambda: last_lines(child.log, 1))
        assert last_lines(child.log, 1) == [f"'' 1 {tmp_path.resolve()}"]


async def test_log_is_bounded_by_one_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES_MAX", 20_000)
    code = "import time\nfor i in range(10**9): print(i, 'x' * 100); time.sleep(.0005)"
    async with running(ProcessSpec("x", python(code)), tmp_path) as child:
        rotated = child.log.with_suffix(".log.1")
        await until(rotated.exists)
        first = rotated.read_text().splitlines()[0]
        await until(lambda: rotated.read_text().splitlines()[0] != first)
        assert child.log.stat().st_size < 10_000_000


async def test_process_that_never_answers_is_started_again(tmp_path: Path, tools: Any) -> None:
    probe = Probe("127.0.0.1", tools.free_port(), timeout_s=0.2, period_s=0.1)
    spec = ProcessSpec("x", python("import time; time.sleep(300)"), probe=probe, start_timeout_s=0.5)
    async with running(spec, tmp_path) as child:
        await until(lambda: child.state.restarts == 1)
        assert "gave no answer from" in child.state.last_exit
        assert not child.state.ready


async def test_readiness_and_a_hang_are_seen(tmp_path: Path, tools: Any) -> None:
    port = tools.free_port()
    argv = (sys.executable, str(tools.HERE / "backend.py"), "--http_port", str(port))
    spec = ProcessSpec("x", argv, probe=Probe("127.0.0.1", port, timeout_s=0.2, period_s=0.05))
    async with running(spec, tmp_path) as child:
        await until(lambda: child.state.ready)
        await asyncio.to_thread(tools.call, f"http://127.0.0.1:{port}/control", {"ready": False})
        await until(lambda: child.state.message == "not ready: the feature store is away")
        await asyncio.to_thread(tools.call, f"http://127.0.0.1:{port}/control", {"ready": True, "hang": True})
        await until(lambda: child.state.restarts == 1)
        assert child.state.last_exit.startswith(f"hung: no answer from 127.0.0.1:{port}/v2/health/ready 8 times in a row")
        await until(lambda: child.state.ready)


async def test_probe_of_something_that_is_not_http(tools: Any) -> None:
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 smtp here\r\n")
        writer.close()

    server = await asyncio.start_server(rude, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert (await ask(Probe("127.0.0.1", port))).message == "the answer is not HTTP"
    assert (await ask(Probe("127.0.0.1", port, None))).state == "ready"
    server.close()
    assert (await ask(Probe("127.0.0.1", tools.free_port(), None))).state == "silent"


@pytest.mark.parametrize(("body", "said"), [
    (b'{"detail": "no model"}', "no model"), (b'{"error": "x"}', "x"), (b"plain", "status 503"), (b'{"a": 1}', "status 503"),
    (b'["a"]', "status 503"),
], ids=["problem", "kserve", "text", "other json", "list"])
async def test_reason_of_an_unready_service_is_found(body: bytes, said: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found = await ask(Probe("127.0.0.1", server.sockets[0].getsockname()[1]))
    server.close()
    assert (found.state, found.message) == ("unready", said)


def test_children_are_tied_in_the_main_thread_only() -> None:
    caught: list[str] = []

    def elsewhere() -> None:
        try:
            tied_to_parent()
        except RuntimeError as e:
            caught.append(str(e))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_leftovers_are_found_by_their_mark_and_others_are_spared(tmp_path: Path, tools: Any) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    spawned = [
        subprocess.Popen(["sleep", "300"], env={**os.environ, processes.MARK: str(folder.resolve())}) for folder in (mine, other)
    ]
    try:
        assert kill_leftovers(mine) == [spawned[0].pid]
        assert tools.alive(spawned[1].pid)
    finally:
        for p in spawned:
            p.kill()
            p.wait()


def test_last_lines_of_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "no.log", 3) == []
