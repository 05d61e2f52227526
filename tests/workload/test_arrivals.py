"""When requests come."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from quire.errors import ConfigError
from quire.workload import TraceRequest, arrive_at, sped_up

MANY = [TraceRequest(None, 1, 1)] * 20_000


def times(requests: list[TraceRequest]) -> list[float]:
    assert all(request.arrival_s is not None for request in requests)
    return [request.arrival_s or 0.0 for request in requests]


def test_a_poisson_process() -> None:
    at = times(arrive_at(MANY, 5.0))
    gaps = [b - a for a, b in pairwise(at)]
    assert at[0] == 0.0
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 5, rel=0.03)
    assert pstdev(gaps) == pytest.approx(1 / 5, rel=0.05), "as long as their mean"


def test_another_rate_is_the_same_process_at_another_speed() -> None:
    assert times(arrive_at(MANY, 10.0)) == pytest.approx([t / 2 for t in times(arrive_at(MANY, 5.0))])
    assert times(arrive_at(MANY, 5.0, seed=1)) != times(arrive_at(MANY, 5.0))
    assert set(times(arrive_at(MANY, float("inf")))) == {0.0}


def test_published_numbers_stay_comparable() -> None:
    assert times(arrive_at(MANY[:4], 1.0)) == pytest.approx([0.0, 1.8401, 2.7810, 4.1252], abs=1e-4)


def test_a_trace_at_another_speed_in_the_order_of_its_times() -> None:
    trace = [TraceRequest(30.0, 1, 1), TraceRequest(10.0, 2, 2), TraceRequest(20.0, 3, 3)]
    assert sped_up(trace, 2.0) == [TraceRequest(0.0, 2, 2), TraceRequest(5.0, 3, 3), TraceRequest(10.0, 1, 1)]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(ConfigError, match="--rate must be above 0"):
        arrive_at(MANY[:2], rate)


def test_bad_speeds() -> None:
    with pytest.raises(ConfigError, match="--speedup must be above 0, got inf"):
        sped_up([TraceRequest(0.0, 1, 1)], float("inf"))
    with pytest.raises(ConfigError, match="says lengths, but not when"):
        sped_up([TraceRequest(0.0, 1, 1), TraceRequest(None, 1, 1)], 1.0)
