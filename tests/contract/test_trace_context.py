"""What of a caller's id and trace is passed on, and that nothing malformed is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import sampling as sdk
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.span import INVALID_SPAN

from hafnium_contract.errors import InputError
from hafnium_contract.trace_context import (
    REQUEST_IDS_BYTES_MAX,
    TraceParent,
    id_line,
    request_id_of,
    request_ids_of,
    sampling_of,
    trace_lines,
    traceparent_of,
    tracestate_of,
    without_repeated,
)

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
GOOD = b"00-%s-%s-01" % (TRACE, SPAN)


@pytest.mark.parametrize(("value", "sampled"), [
    (GOOD, True), (GOOD[:-2] + b"00", False), (GOOD[:-2] + b"03", True), (GOOD[:-2] + b"02", False),
    (b"cc" + GOOD[2:] + b"-what-comes-in-2040", True), (b"01" + GOOD[2:], True),
], ids=["sampled", "not sampled", "sampled and random", "random", "a later version with more", "a later version"])
def test_a_traceparent_of_the_standard_is_read_and_passed_on_in_version_00(value: bytes, sampled: bool) -> None:
    assert traceparent_of(value) == TraceParent(int(TRACE, 16), int(SPAN, 16), sampled)
    assert trace_lines({b"traceparent": value}) == b"traceparent: 00-%s-%s-%s\r\n" % (TRACE, SPAN, value[53:55])


@pytest.mark.parametrize("value", [
    b"", b"x", GOOD[:-1], GOOD + b"0", GOOD + b"-more", b"ff" + GOOD[2:], GOOD.upper(), GOOD.replace(TRACE, b"0" * 32),
    GOOD.replace(SPAN, b"0" * 16), GOOD.replace(b"-", b"_"), b" " + GOOD, GOOD + b"\r\nevil: 1", GOOD + b"\n", b"cc" + GOOD[2:] + b"-\x00",
    b"0" * 100_000,
])
def test_a_malformed_traceparent_goes_no_further_and_takes_its_tracestate_along(value: bytes) -> None:
    assert traceparent_of(value) is None
    assert trace_lines({b"traceparent": value, b"tracestate": b"a=1"}) == b""


@given(st.binary(max_size=80) | st.from_regex(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True))
def test_what_is_read_is_what_opentelemetry_reads(value: bytes) -> None:
    """Its own propagator is the oracle; it strips white space, which a header's value never has around it."""
    from opentelemetry import trace

    theirs = trace.get_current_span(TraceContextTextMapPropagator().extract({"traceparent": value.decode("latin-1")}))
    ours = traceparent_of(value)
    if ours is None:
        assert theirs is INVALID_SPAN or value != value.strip() or re.search(rb"[^\x20-\x7e]", value)
    else:
        context = theirs.get_span_context()
        assert (ours.trace_id, ours.span_id, ours.sampled) == (context.trace_id, context.span_id, context.trace_flags.sampled)


@pytest.mark.parametrize(("value", "kept"), [
    (b"a=1", True), (b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", True), (b"tenant@system=x", True), (b"a=1, b=2", True),
    (b"a=1,,b=2", True), (b"", False), (b"a", False), (b"a=1\r\nx: y", False), (b"A=1", False), (b"a=" + b"x" * 600, False),
    (b",".join(b"k%d=1" % i for i in range(33)), False), (b"a=b=c", False), (b"a=\xff", False),
])
def test_a_tracestate_goes_on_when_it_is_of_the_standards_form(value: bytes, kept: bool) -> None:
    assert tracestate_of(value) == (value if kept else b"")
    expected = b"traceparent: %s\r\n" % GOOD + (b"tracestate: %s\r\n" % value if kept else b"")
    assert trace_lines({b"traceparent": GOOD, b"tracestate": value}) == expected


def test_a_tracestate_alone_means_nothing() -> None:
    assert trace_lines({b"tracestate": b"a=1"}) == b""


@pytest.mark.parametrize(("value", "kept"), [
    (b"abc-1", True), (b"two words", True), (b"x" * 256, True), (b"a,b", True), (None, False), (b"", False), (b"x" * 257, False),
    (b"a\tb", False), (b"a\x7f", False), (b"\xe9", False), (b"a\r\nb", False), (b" a", False), (b"a ", False),
])
def test_an_id_is_visible_ascii_of_bounded_length(value: bytes | None, kept: bool) -> None:
    assert request_id_of(value) == ((value or b"").decode("latin-1") if kept else "")


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=256), min_size=1, max_size=200))
def test_a_line_of_ids_is_bounded_and_says_how_many_it_has_not(ids: list[str]) -> None:
    line = id_line(ids, len(ids))
    value = line.removeprefix(b"x-request-id: ").removesuffix(b"\r\n")
    assert len(value) <= REQUEST_IDS_BYTES_MAX
    assert request_ids_of(value) == value.decode()
    shown = value.decode().split(",")
    if shown == ids:
        return
    left = int(shown[-1].removeprefix("+"))
    assert shown[:-1] == ids[: len(ids) - left]
    assert sum(len(i) + 1 for i in ids) > REQUEST_IDS_BYTES_MAX - 400, "something was left out although there was room"


def test_the_uuids_of_a_whole_default_batch_fit() -> None:
    ids = [f"{i:036d}" for i in range(128)]
    assert id_line(ids, 128) == b"x-request-id: %s\r\n" % ",".join(ids).encode()


def test_what_came_twice_counts_as_not_given() -> None:
    pairs = [(b"x-request-id", b"a"), (b"x-request-id", b"b"), (b"traceparent", GOOD), (b"traceparent", GOOD), (b"tracestate", b"a=1"),
             (b"tracestate", b"b=2"), (b"x-other", b"1"), (b"x-other", b"2")]
    assert without_repeated(pairs, dict(pairs)) == {b"tracestate": b"a=1,b=2", b"x-other": b"2"}
    once = [(b"x-request-id", b"a"), (b"traceparent", GOOD), (b"tracestate", b"a=1")]
    assert without_repeated(once, dict(once)) == dict(once)


@pytest.mark.parametrize("name", ["always_on", "always_off", "traceidratio", "parentbased_always_on", "parentbased_always_off",
                                  "parentbased_traceidratio", ""])
@pytest.mark.parametrize("share", ["0", "0.25", "1", ""])
def test_every_sampler_decides_as_opentelemetrys_own_does(monkeypatch: pytest.MonkeyPatch, name: str, share: str) -> None:
    from opentelemetry import trace

    env = {k: v for k, v in (("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", share)) if v}
    for key in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    theirs = sdk._get_from_env_or_default()
    ours = sampling_of(env)
    for trace_id in (1, 2**62 - 1, 2**62, 2**64 - 1, 2**127 + 5, 2**128 - 1):
        for parent in (None, TraceParent(trace_id, 7, sampled=True), TraceParent(trace_id, 7, sampled=False)):
            context = None if parent is None else trace.set_span_in_context(trace.NonRecordingSpan(trace.SpanContext(
                trace_id, 7, is_remote=True, trace_flags=trace.TraceFlags(int(parent.sampled)))))
            assert ours.keeps(trace_id, parent) == theirs.should_sample(context, trace_id, "x").decision.is_sampled()


@pytest.mark.parametrize("env", [
    {"OTEL_TRACES_SAMPLER": "sometimes"}, {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"},
    {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"},
    {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1%"},
])
def test_a_sampler_that_does_not_exist_is_named(env: dict[str, str]) -> None:
    with pytest.raises(InputError, match=list(env)[-1]):
        sampling_of(env)
