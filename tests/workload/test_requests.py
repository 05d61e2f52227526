"""Workloads are pure functions of their seed, and have the lengths that they promise."""

from __future__ import annotations

from itertools import islice
from statistics import fmean, median, pstdev

import pytest

from quire.errors import ConfigError
from quire.workload import (
    PAPER,
    PREFIX_BLOCK,
    Lengths,
    TraceRequest,
    draw_lengths,
    draw_requests,
    paper_lengths,
    prompt_token_ids,
    synthetic,
)


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


BAD = [
    {"mean": 0},
    {"mean": 513},
    {"mean": float("nan")},
    {"mean": 5, "sigma": -1},
    {"mean": 5, "cap": 4},
    {"mean": 5, "floor": 0},
    {"mean": 5, "floor": 6},
]


@pytest.mark.parametrize("bad", BAD)
def test_bad_lengths(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Lengths(**bad)  # type: ignore[arg-type]


def test_no_requests() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        synthetic(0, Lengths(1), Lengths(1), 10)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_distributions_have_their_mean_and_variation(name: str) -> None:
    for lengths, (mean, cv, floor, cap) in zip(paper_lengths(name), PAPER[name], strict=True):
        assert lengths.moments() == pytest.approx((mean, cv), rel=1e-9)
        assert (lengths.floor, lengths.cap) == (floor, cap)
        whole = [lengths.quantile((i + 0.5) / 20_000) for i in range(20_000)]
        assert fmean(whole) == pytest.approx(mean, rel=1e-3), "rounded, and not by the closed form"
        assert pstdev(whole) / fmean(whole) == pytest.approx(cv, rel=1e-3)
        assert floor <= min(whole) <= max(whole) <= cap


def test_the_paper_s_distributions_stay_comparable() -> None:
    drawn = {name: list(islice(draw_lengths(*paper_lengths(name), 0), 4)) for name in PAPER}
    assert drawn == {
        "sharegpt-paper": [(51, 341), (885, 120), (83, 268), (203, 152)],
        "alpaca-paper": [(11, 56), (61, 17), (15, 42), (25, 23)],
    }


@pytest.mark.parametrize("lengths", [Lengths(128), Lengths(20, 2.0, 100, 10), Lengths(50, 0.3, 60, 40), Lengths(7, 0)])
def test_moments_against_the_sum_over_quantiles(lengths: Lengths) -> None:
    steps = 100_000
    # The same distribution a thousand times as long: rounding vanishes.
    fine = Lengths(1000 * lengths.mean, lengths.sigma, 1000 * lengths.cap, 1000 * lengths.floor)
    values = [fine.quantile((i + 0.5) / steps) / 1000 for i in range(steps)]
    assert lengths.moments() == pytest.approx((fmean(values), pstdev(values) / fmean(values)), rel=1e-4)


@pytest.mark.parametrize("wanted", [(10, 5, 1, 20), (10, 1, 20, 30), (25, -1, 20, 30), (float("nan"), 1, 1, 30)])
def test_moments_that_nothing_has(wanted: tuple[float, float, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"no lognormal clipped to .*: widen the range, or ask for less variation"):
        Lengths.with_moments(*wanted)


def test_an_unknown_distribution() -> None:
    with pytest.raises(ConfigError, match="no built-in workload 'chat'; choose from: sharegpt-paper, alpaca-paper"):
        paper_lengths("chat")


def test_draws_without_tokens() -> None:
    requests = draw_requests(5, Lengths(20), Lengths(30), seed=2)
    same = synthetic(5, Lengths(20), Lengths(30), 100, seed=2)
    assert requests == [TraceRequest(None, len(w.prompt_token_ids), w.output_tokens) for w in same]
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        draw_requests(0, Lengths(1), Lengths(1))


def test_equal_prefix_ids_give_equal_tokens() -> None:
    long = TraceRequest(0.0, 1300, 1, (7, 8, 9))
    tokens = prompt_token_ids(long, 0, 1000)
    assert len(tokens) == 1300
    assert all(0 <= token < 1000 for token in tokens)
    assert prompt_token_ids(long, 5, 1000, seed=1) == tokens, "neither the number nor the seed matters"
    assert prompt_token_ids(TraceRequest(0.0, 1030, 1, (7, 8, 9)), 1, 1000) == tokens[:1030], "the last block is cut short"
    other = prompt_token_ids(TraceRequest(0.0, 1300, 1, (7, 8, 10)), 2, 1000)
    assert other[: 2 * PREFIX_BLOCK] == tokens[: 2 * PREFIX_BLOCK]
    assert all(other[i : i + 16] != tokens[i : i + 16] for i in range(2 * PREFIX_BLOCK, 1300 - 16)), "different ids share no block"


def test_prompts_without_ids_share_nothing() -> None:
    request = TraceRequest(None, 600, 1)
    tokens = prompt_token_ids(request, 0, 50)
    assert prompt_token_ids(request, 0, 50) == tokens
    assert prompt_token_ids(TraceRequest(None, 9, 1), 0, 50) == tokens[:9]
    assert set(tokens) == set(range(50))
    for other in (prompt_token_ids(request, 1, 50), prompt_token_ids(request, 0, 50, seed=1)):
        assert all(other[i : i + 16] != tokens[i : i + 16] for i in range(600 - 16))


def test_tokens_stay_comparable() -> None:
    assert prompt_token_ids(TraceRequest(0.0, 3, 1, (0,)), 0, 32_000) == [26762, 5135, 11553]
    assert prompt_token_ids(TraceRequest(None, 3, 1), 0, 32_000) == [24060, 1216, 30279]
