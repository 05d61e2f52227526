"""PastFuture: admit what is expected to fit, judging by how long sequences have lived so far."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from math import exp, sqrt

from quire.core.admission import Footprint, Weights
from quire.core.groups import ONE_GROUP, KVGroups


class Lifetimes:
    """How long sequences live, learned from those that ended and those that run: hazard rates by age (tokens generated).

    In each bucket of ages the chance to end at the next token is taken as constant and estimated by ends / exposure, the
    piecewise form of the Kaplan-Meier estimate (JASA 53, 1958): a sequence that runs, was aborted or met a limit counts
    as exposed for as long as it lived, and not as an end. So early short finishers do not make the estimate short.

        hazard_b = (ends_b + w) / (exposure_b + w / (scale * lindy_b))        lindy(g) = 1 / (g + PRIOR_AGE)
        scale = (all ends + w) / (sum of exposure_b * lindy_b + w)

    ``w`` = ``PRIOR_ENDS``. Where little was seen, Lindy's law speaks (what has lived for g tokens lives about as long again:
    heavy-tailed, hence cautious about memory), scaled to the ends seen at all ages: sequences that run on and on without an
    end, as in a benchmark that ignores end-of-text, are soon expected to run to their limits.

    Old ends fade with each new end: ``memory`` is the number of ends that the estimate stands on. Costs nothing for a
    sequence that runs: an end adds one number per statistic, and exposures are summed when the estimate is renewed.
    """

    PRIOR_AGE = 256.0
    PRIOR_ENDS = 1.0
    BUCKET = 16
    """Width of the youngest buckets; old ones are a quarter of their age wide."""

    def __init__(self, max_tokens: int, memory: int = 1000) -> None:
        self.edges = [0]
        while self.edges[-1] < max_tokens:
            self.edges.append(max(self.edges[-1] + self.BUCKET, self.edges[-1] * 5 // 4))
        count = len(self.edges) - 1
        self._growth = memory / (memory - 1)
        self._weight = 1.0  # of one sequence now; grows instead of letting everything else shrink
        self._ended = [0.0] * count  # those that left in a bucket, by end, limit or abort
        self._excess = [0.0] * count  # their tokens above the bucket's lower edge
        self._stopped = [0.0] * count  # those of them that ended by themselves

    def bucket(self, age: int) -> int:
        return min(bisect_right(self.edges, age), len(self.edges) - 1) - 1

    def ended(self, age: int, stopped: bool) -> None:
        b = self.bucket(age)
        self._ended[b] += self._weight
        self._excess[b] += self._weight * (age - self.edges[b])
        if stopped:
            self._stopped[b] += self._weight
        self._weight *= self._growth
        if self._weight > 1e9:
            for statistic in (self._ended, self._excess, self._stopped):
                statistic[:] = [value / self._weight for value in statistic]
            self._weight = 1.0

    def survival(self, counts: list[int], ages: list[int], ahead: list[int]) -> list[list[float]]:
        """[bucket][k]: the chance that a sequence in the middle of the bucket lives ``ahead[k]`` tokens longer.

        ``counts`` and ``ages``: the running sequences in each bucket, and the sum of their ages.
        """
        edges, weight = self.edges, self._weight
        buckets = len(edges) - 1
        lindy = [1.0 / (self.PRIOR_AGE + (edges[b] + edges[b + 1]) / 2) for b in range(buckets)]
        exposure = [0.0] * buckets
        older = 0.0
        for b in range(buckets - 1, -1, -1):
            exposure[b] = self._excess[b] / weight + ages[b] - counts[b] * edges[b] + older * (edges[b + 1] - edges[b])
            older += self._ended[b] / weight + counts[b]
        expected = sum(e * p for e, p in zip(exposure, lindy, strict=True))
        scale = (sum(self._stopped) / weight + self.PRIOR_ENDS) / (expected + self.PRIOR_ENDS)
        cumulative = [0.0]  # of the hazard, at the edges
        for b in range(buckets):
            hazard = (self._stopped[b] / weight + self.PRIOR_ENDS) / (exposure[b] + self.PRIOR_ENDS / (scale * lindy[b]))
            cumulative.append(cumulative[b] + hazard * (edges[b + 1] - edges[b]))
        table = []
        for b in range(buckets):
            middle = (edges[b] + edges[b + 1]) / 2
            start = (cumulative[b] + cumulative[b + 1]) / 2
            row = []
            c = b
            for t in ahead:
                while c < buckets - 1 and edges[c + 1] < middle + t:
                    c += 1
                slope = (cumulative[c + 1] - cumulative[c]) / (edges[c + 1] - edges[c])
                row.append(exp(min(0.0, start - cumulative[c] - (middle + t - edges[c]) * slope)))
            table.append(row)
        return table


class PastFuture:
    """Admit while the peak expected from past lengths fits: the idea of LightLLM's past-future scheduler (arXiv 2507.10150).

    A sequence of c positions holds c + t after t more steps with the chance s (``Lifetimes``), else nothing; never after
    its limit. A block is (B - 1)/2 short of full on average. In positions, over the sequences, for t on a grid:

        E(t) = sum of s (c + t + (B - 1)/2)              Var(t) = sum of s (1 - s) (c + t + (B - 1)/2)^2
        admit while  E(t) + z sqrt(Var(t)) <= capacity for t <= HORIZON,  and  E(t) <= capacity after that

    Chance is looked at for a short time only: later, younger sequences can be preempted more cheaply than memory can be
    kept empty until then. The mean is looked at as far as a sequence may live, so that a batch which is going to grow
    (all young, or all told to run to their limit) is seen in time. ``z`` trades memory for preemptions.

    Where some layers have a window, a sequence weighs more than its positions, and grows faster until they fill it: t is what it grows
    by in t steps (admission.py's Weights).

    Sequences are grouped by age, by the time that they have left, and by how long they still grow faster: a decision costs a few sums per
    sequence, and then depends on the number of groups only.
    """

    HORIZON = 90

    def __init__(self, block_size: int, max_tokens: int, groups: KVGroups = ONE_GROUP, z: float = 1.5, memory: int = 1000) -> None:
        self._block_size = block_size
        self._weights = Weights(block_size, groups)
        self._z = z
        self._lifetimes = Lifetimes(max_tokens, memory)
        self._ahead = [0, 4, 8, 12, 18, 27, 40, 60, self.HORIZON]
        self._near = len(self._ahead)
        while self._ahead[-1] < max_tokens:
            self._ahead.append(self._ahead[-1] * 2)
        self._margin = [z if t <= self.HORIZON else 0.0 for t in self._ahead]
        self._table: list[list[float]] = []
        self._renew_every = max(1, memory // 32)
        self._seen = 0
        self._news = 0
        self._capacity = 0  # positions
        self._mean: list[float] = []
        self._variance: list[float] = []

    def survey(self, running: Iterable[Footprint], free: int) -> None:
        size, ahead, edges = self._block_size, self._ahead, self._lifetimes.edges
        last_bucket, last = len(edges) - 2, ahead[-1]
        slack = (size - 1) / 2
        held = 0
        ratio, reach = self._weights.ratio, self._weights.reach
        groups: dict[tuple[int, int, int], list[float]] = {}
        for own, generated, positions, remaining, shared in running:
            held += own
            b = bisect_right(edges, generated) - 1
            if b > last_bucket:
                b = last_bucket
            end = bisect_left(ahead, remaining) if remaining < last else len(ahead)
            c, faster = positions - shared * size + slack, 0.0
            if not ratio:
                key = b, end, 0
            else:
                faster = max(0, reach - positions)
                c += ratio * min(positions, reach)
                key = b, end, bisect_left(ahead, faster)
            group = groups.get(key)
            if group is None:
                groups[key] = [1, c, c * c, remaining, generated, faster]
            else:
                group[0] += 1
                group[1] += c
                group[2] += c * c
                group[3] += remaining
                group[4] += generated
                group[5] += faster
        self._capacity = (free + held) * size // self._weights.unit
        self._renew(groups)
        mean = [0.0] * len(ahead)
        variance = [0.0] * len(ahead)
        for (b, end, _), (count, total, squares, limits, _, faster) in groups.items():
            survival, near = self._table[b], faster / count
            for k in range(min(end, len(ahead))):
                s, t = survival[k], self._grown(ahead[k], near) if near else ahead[k]
                mean[k] += s * (total + count * t)
                if k < self._near:
                    variance[k] += s * (1.0 - s) * (squares + t * (2.0 * total + count * t))
            if end < len(ahead):  # their limit comes before the grid's next time: they count there with what they end with
                s, u = survival[end], self._grown(limits / count, near)
                mean[end] += s * (total + count * u)
                variance[end] += s * (1.0 - s) * (squares + u * (2.0 * total + count * u))
        self._mean, self._variance = mean, variance

    def admits(self, candidate: Footprint) -> bool:
        weights, size = self._weights, self._block_size
        capacity = self._capacity + candidate.held * size // weights.unit
        mean, variance = self._mean.copy(), self._variance.copy()
        positions, faster = candidate.positions, max(0, weights.reach - candidate.positions)
        c = positions - candidate.shared * size + (size - 1) / 2 + weights.ratio * min(positions, weights.reach)
        before = -1
        for k, s in enumerate(self._table[self._lifetimes.bucket(candidate.generated)]):
            if before < candidate.remaining:
                now = c + self._grown(min(self._ahead[k], candidate.remaining), faster)
                mean[k] += s * now
                variance[k] += s * (1.0 - s) * now * now
                before = self._ahead[k]
            if mean[k] + self._margin[k] * sqrt(variance[k]) > capacity:
                return False
        self._capacity, self._mean, self._variance = capacity, mean, variance
        return True

    def room(self) -> int:
        peak = max(mean + z * sqrt(variance) for mean, z, variance in zip(self._mean, self._margin, self._variance, strict=True))
        return int((self._capacity - peak) // self._block_size) * self._weights.unit

    def _grown(self, steps: float, faster: float) -> float:
        """What a sequence weighs more after so many steps, which grows faster for the first ``faster`` of them."""
        return steps + self._weights.ratio * min(steps, faster)

    def ended(self, generated: int, stopped: bool) -> None:
        self._lifetimes.ended(generated, stopped)
        self._seen += 1
        self._news += 1

    def _renew(self, groups: dict[tuple[int, int, int], list[float]]) -> None:
        """Renew the survival table: often while little is known, then each time that 3 % of what it stands on is new."""
        if self._table and self._news < min(self._renew_every, 1 + self._seen // 32):
            return
        counts = [0] * (len(self._lifetimes.edges) - 1)
        ages = counts.copy()
        for (b, _, _), (count, _, _, _, generated, _) in groups.items():
            counts[b] += int(count)
            ages[b] += int(generated)
        self._table = self._lifetimes.survival(counts, ages, self._ahead)
        self._news = 0
