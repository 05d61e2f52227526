"""Distributions of request lengths, and draws from them.

Lengths of chat traffic are skewed: many short, few long. A lognormal distribution describes them well; ``sigma`` is the
standard deviation of the logarithm (0 gives equal lengths).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from statistics import NormalDist

from quire.errors import ConfigError

SIGMA = 0.8
"""Of both lengths: the longest tenth is 2.8 times as long as the median or longer."""
CAP = 512
"""Longest prompt, and longest output, in tokens."""
MAX_SIGMA = 4.0

_Moments = tuple[float, float, int, int]
PAPER: dict[str, tuple[_Moments, _Moments]] = {
    "sharegpt-paper": ((161.31, 1.35, 4, 1500), (337.99, 0.87, 4, 1600)),
    "alpaca-paper": ((19.31, 0.75, 6, 400), (58.45, 1.1, 2, 700)),
}
"""Name → prompt and output: mean, coefficient of variation, shortest, longest (tokens), all after clipping. They stand for
the datasets of the PagedAttention paper, whose means these are (arXiv 2309.06180, Fig. 11)."""


@dataclass(slots=True, frozen=True)
class Lengths:
    """A lognormal distribution of lengths in tokens, rounded and kept within ``floor`` and ``cap``."""

    mean: float
    """Mean before the cap, which lowers it a little (128 becomes 125 at the defaults)."""
    sigma: float = SIGMA
    cap: int = CAP
    floor: int = 1

    def __post_init__(self) -> None:
        if self.floor < 1:
            raise ConfigError(f"the shortest length must be at least 1, got {self.floor}")
        if not (self.floor <= self.mean <= self.cap):  # NaN fails this too
            raise ConfigError(f"the mean length must be from {self.floor} to the longest length {self.cap}, got {self.mean:g}")
        if not (0 <= self.sigma <= MAX_SIGMA):
            raise ConfigError(f"sigma must be from 0 to {MAX_SIGMA:g}, got {self.sigma:g}")

    @property
    def _mu(self) -> float:
        """Mean of the logarithm."""
        return math.log(self.mean) - self.sigma**2 / 2

    def quantile(self, p: float) -> int:
        """The length that a share ``p`` of all lengths does not exceed; 0 < p < 1."""
        return min(self.cap, max(self.floor, round(math.exp(self._mu + self.sigma * NormalDist().inv_cdf(p)))))

    def moments(self) -> tuple[float, float]:
        """Mean and coefficient of variation after clipping, before rounding (which changes them by less than 0.1 %).

        With X = exp(mu + sigma Z) and a, b the standard scores of floor and cap:
        E[clip(X)^k] = floor^k Φ(a) + exp(k mu + k² sigma²/2) (Φ(b − k sigma) − Φ(a − k sigma)) + cap^k (1 − Φ(b)).
        """
        if self.sigma == 0:
            return self.mean, 0.0
        mu, sigma, phi = self._mu, self.sigma, NormalDist().cdf
        a, b = ((math.log(end) - mu) / sigma for end in (self.floor, self.cap))
        first, second = (
            self.floor**k * phi(a)
            + math.exp(k * mu + (k * sigma) ** 2 / 2) * (phi(b - k * sigma) - phi(a - k * sigma))
            + self.cap**k * phi(-b)
            for k in (1, 2)
        )
        return first, math.sqrt(max(0.0, second - first**2)) / first

    @classmethod
    def with_moments(cls, mean: float, cv: float, floor: int, cap: int) -> Lengths:
        """The distribution whose mean and coefficient of variation after clipping are these. ConfigError where there is none."""

        def at(sigma: float) -> Lengths:
            return cls(_root(lambda before: cls(before, sigma, cap, floor).moments()[0] - mean, floor, cap), sigma, cap, floor)

        found = at(_root(lambda sigma: at(sigma).moments()[1] - cv, 0.0, MAX_SIGMA))
        got = found.moments()
        if not all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(got, (mean, cv), strict=True)):
            raise ConfigError(
                f"no lognormal clipped to {floor}–{cap} has mean {mean:g} and coefficient of variation {cv:g}; the nearest found has "
                f"{got[0]:g} and {got[1]:g}: widen the range, or ask for less variation"
            )
        return found


def draw_lengths(prompt: Lengths, output: Lengths, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Endless (prompt, output) lengths in tokens. The first n are the same however many are taken."""
    # Only Random.random() is promised to stay the same between Python versions, so everything is derived from it.
    random = Random(f"{seed}/lengths").random
    while True:
        yield prompt.quantile(_open(random())), output.quantile(_open(random()))


@cache
def paper_lengths(name: str) -> tuple[Lengths, Lengths]:
    """Prompt and output lengths of a distribution in ``PAPER``; solved once, in about 0.1 s. ConfigError for another name."""
    if name not in PAPER:
        raise ConfigError(f"there is no built-in workload {name!r}; choose from: {', '.join(PAPER)}")
    prompt, output = PAPER[name]
    return Lengths.with_moments(*prompt), Lengths.with_moments(*output)


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where the increasing ``f`` is zero, by bisection to the last bit; the nearer end where it is zero nowhere."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2


def _open(p: float) -> float:
    """[0, 1) → (0, 1): the inverse of a normal distribution has no value at 0."""
    return p + 2.0**-54
