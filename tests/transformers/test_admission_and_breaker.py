"""Token buckets, breaker and retry budget: pure, with time as an argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hafnium_transformer.admission import QueryVolume, RateLimiter
from hafnium_transformer.breaker import Breaker, RetryBudget


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    limiter = RateLimiter(10.0, 5.0, 100)
    assert [limiter.wait_s("a", 1, 0.0) for _ in range(5)] == [0.0] * 5
    assert limiter.wait_s("a", 1, 0.0) == pytest.approx(0.1)
    assert limiter.wait_s("b", 1, 0.0) == 0.0
    assert limiter.wait_s("a", 1, 0.1) == 0.0
    assert limiter.wait_s("a", 5, 0.1) == pytest.approx(0.5)


def test_a_batch_larger_than_the_burst_passes_once_and_leaves_a_debt() -> None:
    limiter = RateLimiter(10.0, 5.0, 100)
    assert limiter.wait_s("a", 25, 0.0) == 0.0
    assert limiter.wait_s("a", 1, 1.0) == pytest.approx(1.1)  # 20 owed, 10 paid, 1 wanted
    assert limiter.wait_s("a", 1, 2.2) == 0.0


def test_a_batch_that_is_asked_for_in_two_steps_is_taken_as_in_one() -> None:
    limiter = RateLimiter(10.0, 5.0, 100)
    assert [limiter.wait_s("a", 1, 0.0), limiter.wait_s("a", 25, 0.05, already=1)] == [0.0, 0.0]
    assert limiter.wait_s("a", 1, 1.05) == pytest.approx(1.1)  # 20 owed, 10 paid, 1 wanted
    assert [limiter.wait_s("b", 3, 0.0), limiter.wait_s("b", 1, 0.0)] == [0.0, 0.0]
    assert limiter.wait_s("b", 4, 0.0, already=1) == pytest.approx(0.3)
    assert limiter.wait_s("b", 1, 0.0) == 0.0
    assert limiter.wait_s("b", 1, 0.0) == pytest.approx(0.1)  # of the refused request the first step was paid: its body was read


def test_clients_beyond_the_limit_push_out_who_was_silent_for_longest() -> None:
    limiter = RateLimiter(0.001, 1.0, 2)
    assert limiter.wait_s("a", 1, 0.0) == 0.0
    assert limiter.wait_s("b", 1, 1.0) == 0.0
    assert limiter.wait_s("a", 1, 2.0) > 0.0  # seen again: now b is the older one
    assert limiter.wait_s("c", 1, 3.0) == 0.0
    assert limiter.wait_s("a", 1, 4.0) > 0.0
    assert limiter.wait_s("b", 1, 5.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 8)), min_size=1, max_size=60))
def test_nobody_gets_more_than_burst_and_rate_allow_but_for_one_batch(asked: list[tuple[float, int]]) -> None:
    rate, burst = 4.0, 6.0
    limiter, now, given_rows, largest = RateLimiter(rate, burst, 10), 0.0, 0, 0
    for pause, rows in asked:
        now += pause
        if limiter.wait_s("a", rows, now) == 0.0:
            given_rows += rows
            largest = max(largest, rows)
        assert given_rows <= burst + rate * now + max(largest - burst, 0.0) + 1e-6


def test_the_volume_of_a_minute_is_known_when_it_has_ended() -> None:
    volume = QueryVolume(2)
    assert volume.asked("a", 3, 0.0)
    for client, rows in (("a", 4), ("b", 5), ("c", 100)):
        assert not volume.asked(client, rows, 30.0)
    assert volume.asked("a", 1, 61.0)
    assert (volume.clients, volume.busiest_rows) == (2, 7)  # c was one client too many to tell apart


def test_the_breaker_opens_after_failures_in_a_row_and_lets_one_try() -> None:
    breaker = Breaker(3, 1.0, 4.0)
    for _ in range(2):
        breaker.failed(0.0)
    breaker.succeeded()
    for _ in range(3):
        assert breaker.may_ask(0.0)
        breaker.failed(0.0)
    assert breaker.is_open
    assert not breaker.may_ask(0.9)
    assert breaker.wait_s(0.4) == pytest.approx(0.6)
    assert breaker.may_ask(1.1)
    assert not breaker.may_ask(1.1)  # one is trying
    breaker.failed(1.2)
    assert not breaker.may_ask(3.1)  # twice as long
    assert breaker.may_ask(3.3)
    breaker.succeeded()
    assert not breaker.is_open
    assert breaker.may_ask(3.4)


def test_a_pause_has_a_longest_and_a_trial_that_says_nothing_does_not_close_for_ever() -> None:
    breaker = Breaker(1, 1.0, 4.0)
    now = 0.0
    for _ in range(6):
        breaker.failed(now)
        now += breaker.wait_s(now)
        assert breaker.may_ask(now)
    assert not breaker.may_ask(now + 3.9)
    assert breaker.may_ask(now + 4.1)


def test_retries_are_a_share_of_requests_and_a_few() -> None:
    budget = RetryBudget(0.1, 3.0)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    for _ in range(11):
        budget.requested()
    assert [budget.take() for _ in range(2)] == [True, False]
    for _ in range(1000):
        budget.requested()
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
