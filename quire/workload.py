"""What benchmark, planner and simulator run: requests with realistic lengths, as a pure function of a seed.

Lengths of chat traffic are skewed: many short, few long. A lognormal distribution describes them well; ``sigma`` is the
standard deviation of the logarithm (0 gives equal lengths).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import NormalDist

from quire.errors import ConfigError

SIGMA = 0.8
"""Of both lengths: the longest tenth is 2.8 times as long as the median or longer."""
CAP = 512
"""Longest prompt, and longest output, in tokens."""


@dataclass(slots=True, frozen=True)
class Lengths:
    """A lognormal distribution of lengths in tokens, rounded and kept within 1 and ``cap``."""

    mean: float
    """Mean before the cap, which lowers it a little (128 becomes 125 at the defaults)."""
    sigma: float = SIGMA
    cap: int = CAP

    def __post_init__(self) -> None:
        if not (1 <= self.mean <= self.cap):  # NaN fails this too
            raise ConfigError(f"the mean length must be from 1 to the longest length {self.cap}, got {self.mean:g}")
        if not (0 <= self.sigma <= 4):
            raise ConfigError(f"sigma must be from 0 to 4, got {self.sigma:g}")

    def quantile(self, p: float) -> int:
        """The length that a share ``p`` of all lengths does not exceed; 0 < p < 1."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return min(self.cap, max(1, round(math.exp(mu + self.sigma * NormalDist().inv_cdf(p)))))


@dataclass(slots=True, frozen=True)
class WorkloadRequest:
    """One request: its prompt, and how many tokens it generates."""

    prompt_token_ids: list[int]
    output_tokens: int


def draw_lengths(prompt: Lengths, output: Lengths, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Endless (prompt, output) lengths in tokens. The first n are the same however many are taken."""
    # Only Random.random() is promised to stay the same between Python versions, so everything is derived from it.
    random = Random(f"{seed}/lengths").random
    while True:
        yield prompt.quantile(_open(random())), output.quantile(_open(random()))


def synthetic(num_requests: int, prompt: Lengths, output: Lengths, vocab_size: int, seed: int = 0) -> list[WorkloadRequest]:
    """``num_requests`` requests with random tokens. The first n are the same for any larger number.

    Raises ConfigError for a number below 1.
    """
    if num_requests < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {num_requests}")
    random = Random(f"{seed}/tokens").random
    lengths = draw_lengths(prompt, output, seed)
    made = []
    for _ in range(num_requests):
        prompt_length, output_length = next(lengths)
        made.append(WorkloadRequest([int(random() * vocab_size) for _ in range(prompt_length)], output_length))
    return made


def _open(p: float) -> float:
    """[0, 1) → (0, 1): the inverse of a normal distribution has no value at 0."""
    return p + 2.0**-54
