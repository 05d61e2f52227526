"""How long clients waited lately: the last minute of histograms that count from the start."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from quire.server.metrics.histogram import Histogram

WINDOW_S = 60
STEP_S = 1.0
"""Between the moments that are kept."""


class Recent:
    """What was counted in the last ``WINDOW_S`` seconds, or since this was made."""

    def __init__(self, histograms: Mapping[str, Histogram]) -> None:
        self._histograms = histograms
        self._start = self._counts()
        self._kept: deque[tuple[float, dict[str, tuple[int, ...]]]] = deque()

    def look(self, now: float) -> dict[str, tuple[Sequence[float], list[int]]]:
        """Name → (upper bounds of the buckets, counts: one more, of what is above the last bound). ``now`` only grows."""
        counts = self._counts()
        if not self._kept or now - self._kept[-1][0] >= STEP_S:
            self._kept.append((now, counts))
        while self._kept[0][0] <= now - WINDOW_S:
            self._start = self._kept.popleft()[1]
            if not self._kept:
                self._kept.append((now, counts))
        return {
            name: (histogram.bounds, [b - a for a, b in zip(self._start[name], counts[name], strict=True)])
            for name, histogram in self._histograms.items()
        }

    def _counts(self) -> dict[str, tuple[int, ...]]:
        return {name: histogram.counts for name, histogram in self._histograms.items()}


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value below which ``share`` of what was counted lies, evenly spread within its bucket; None where nothing was. What is above
    the last bound counts as that."""
    rank, seen = share * sum(counts), 0
    for i, count in enumerate(counts):
        if count and seen + count >= rank:
            low = bounds[i - 1] if i else 0.0
            high = bounds[min(i, len(bounds) - 1)]
            return low + (high - low) * max(0.0, rank - seen) / count
        seen += count
    return None
