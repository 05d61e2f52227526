"""Workloads are pure functions of their seed, and have the lengths that they promise."""

from __future__ import annotations

from itertools import islice
from statistics import fmean, median

import pytest

from quire.errors import ConfigError
from quire.workload import Lengths, draw_lengths, synthetic


def test_the_same_seed_gives_the_same_requests() -> None:
    lengths = Lengths(20)
    first = synthetic(10, lengths, lengths, 1000, seed=3)
    assert synthetic(10, lengths, lengths, 1000, seed=3) == first
    assert synthetic(4, lengths, lengths, 1000, seed=3) == first[:4]
    assert synthetic(10, lengths, lengths, 1000, seed=4) != first
    assert all(0 <= t < 1000 for w in first for t in w.prompt_token_ids)
    other = synthetic(10, lengths, lengths, 50, seed=3)
    assert [(len(w.prompt_token_ids), w.output_tokens) for w in other] == [(len(w.prompt_token_ids), w.output_tokens) for w in first]


def test_published_numbers_stay_comparable() -> None:
    """Changing these changes every benchmark that was ever published."""
    lengths = Lengths(128)
    assert list(islice(draw_lengths(lengths, lengths, 0), 4)) == [(63, 128), (475, 46), (90, 101), (168, 58)]
    assert [w.prompt_token_ids[:3] for w in synthetic(2, lengths, lengths, 32_000)] == [[4504, 22809, 27970], [26927, 9967, 29755]]


def test_lengths() -> None:
    drawn = list(islice(draw_lengths(Lengths(128), Lengths(64, sigma=0.5), 1), 20_000))
    prompts, outputs = zip(*drawn, strict=True)
    assert fmean(prompts) == pytest.approx(125, abs=2)
    assert median(prompts) == pytest.approx(93, abs=2)
    assert fmean(outputs) == pytest.approx(64, abs=1)
    assert min(prompts) >= 1
    assert max(prompts) == 512


def test_equal_lengths() -> None:
    assert set(islice(draw_lengths(Lengths(100, 0), Lengths(7, 0)), 50)) == {(100, 7)}


@pytest.mark.parametrize("bad", [{"mean": 0}, {"mean": 513}, {"mean": float("nan")}, {"mean": 5, "sigma": -1}, {"mean": 5, "cap": 4}])
def test_bad_lengths(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Lengths(**bad)  # type: ignore[arg-type]


def test_no_requests() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        synthetic(0, Lengths(1), Lengths(1), 10)
