"""One timer ends the waiting of many."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from hafnium_transformer.expiry import Expiry

PATIENCE_S = 10.0


def future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


async def test_who_waits_too_long_is_told_so_and_not_before() -> None:
    expiry, short, long = Expiry(), future(), future()
    begin = time.monotonic()
    expiry.add(long, begin + 3600.0)
    expiry.add(short, begin + 0.05)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(short), PATIENCE_S)
    assert time.monotonic() >= begin + 0.05
    assert not long.done()


async def test_time_that_is_over_already_ends_it_and_an_answer_that_came_stands() -> None:
    expiry, late, answered = Expiry(), future(), future()
    answered.set_result("here")
    expiry.add(late, time.monotonic() - 1.0)
    expiry.add(answered, time.monotonic() - 1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(late), PATIENCE_S)
    assert answered.result() == "here"


async def test_who_does_not_wait_any_more_hears_nothing() -> None:
    expiry, gone, other = Expiry(), future(), future()
    expiry.add(gone, time.monotonic() - 1.0)
    expiry.remove(gone)
    expiry.add(other, time.monotonic() - 1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(other), PATIENCE_S)
    assert not gone.done()


async def test_a_short_wait_has_a_timer_of_its_own_and_long_ones_share_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a caller's time is for the store: a look every 5 ms would take the other half of who gives 8."""
    timers: list[float] = []
    expiry, loop, futures = Expiry(), asyncio.get_running_loop(), [future() for _ in range(7)]

    class Recorded:
        def call_later(self, delay: float, callback: Any, *args: Any) -> asyncio.TimerHandle:
            timers.append(delay)
            return loop.call_later(delay, callback, *args)

    monkeypatch.setattr(asyncio, "get_running_loop", Recorded)
    now = time.monotonic()
    for one in futures[:4]:
        expiry.add(one, now + 0.25)
    assert len(timers) == 1
    for one, ms in zip(futures[4:], (8.0, 4.0, -1.0), strict=True):
        expiry.add(one, now + ms / 1000.0)
    assert timers[1] <= 0.008
    assert timers[2] <= 0.004
    assert timers[3] == 0.0
    monkeypatch.undo()
    for one in futures[4:]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(one), PATIENCE_S)
    assert not any(one.done() for one in futures[:4])


async def test_it_looks_again_after_nobody_waited_for_a_while() -> None:
    expiry = Expiry()
    for _ in range(2):
        one = future()
        expiry.add(one, time.monotonic())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(one), PATIENCE_S)
        expiry.remove(one)
        await asyncio.sleep(0.05)
