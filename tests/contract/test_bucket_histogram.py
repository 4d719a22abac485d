"""Values counted by bisection, alone or together, stand in the buckets that prometheus_client would have put them in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from hafnium_contract.metric_names import SCORE
from hafnium_contract.serving.bucket_histogram import BucketHistogram

VALUES = st.lists(st.floats(0, 1) | st.sampled_from([*SCORE.buckets, 2.0, -1.0, math.nan, math.inf, -math.inf]), max_size=80)


def seen(histogram: Histogram) -> list[tuple[str, str, float]]:
    return [(s.name, s.labels.get("le", ""), 0.0 if s.value != s.value else round(s.value, 9))
            for m in histogram.collect() for s in m.samples if not s.name.endswith("_created")]


@given(values=VALUES)
def test_values_are_in_the_librarys_buckets_whether_they_come_alone_or_together(values: list[float]) -> None:
    library = Histogram("s", "s", ("a",), buckets=SCORE.buckets, registry=None)
    library.labels("m")
    alone, together = (BucketHistogram("s", "s", ("a",), buckets=SCORE.buckets, registry=None) for _ in range(2))
    for value in values:
        library.labels("m").observe(value)
        alone.labels("m").observe(value)
    alone.labels("m")
    together.labels("m").observe_all(values)
    assert seen(alone) == seen(library)
    assert seen(together) == seen(library)


def test_an_exemplar_is_kept() -> None:
    registry = CollectorRegistry()
    histogram = BucketHistogram("s", "s", buckets=(0.5,), registry=registry)
    histogram.observe(0.2, {"trace": "abc"})
    assert [s.exemplar.labels for m in registry.collect() for s in m.samples if s.exemplar] == [{"trace": "abc"}]


def test_one_with_labels_can_not_be_observed_itself() -> None:
    with pytest.raises((ValueError, AttributeError)):
        BucketHistogram("s", "s", ("a",), buckets=(0.5,), registry=None).observe(0.2)
