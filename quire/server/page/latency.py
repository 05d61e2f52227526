"""How long clients waited lately: from a request to its first token, and from token to token."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

from quire.outputs import SequenceOutput
from quire.server.client import Stream

BOUNDS_S = tuple(0.001 * 2 ** (i / 2) for i in range(32))
"""Upper ends of the buckets, from 1 ms to 46 s in steps of the square root of 2; one more bucket holds what is longer."""
WINDOW_S = 60


class Histogram:
    """Counts of the last ``WINDOW_S`` seconds, kept for each second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, list[int]]] = deque()

    def add(self, seconds: float, count: int, now: float) -> None:
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append((int(now), [0] * (len(BOUNDS_S) + 1)))
        self._seconds[-1][1][bisect_left(BOUNDS_S, seconds)] += count

    def counts(self, now: float) -> list[int]:
        while self._seconds and self._seconds[0][0] <= now - WINDOW_S:
            self._seconds.popleft()
        return [sum(column) for column in zip(*(counts for _, counts in self._seconds), strict=True)] or [0] * (len(BOUNDS_S) + 1)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Seconds below which ``share`` of what was counted lies, evenly spread within its bucket; None where there is nothing."""
    total = sum(counts)
    rank, seen = share * total, 0
    for i, count in enumerate(counts):
        if count and seen + count >= rank:
            low = BOUNDS_S[i - 1] if i else 0.0
            high = BOUNDS_S[min(i, len(BOUNDS_S) - 1)]
            return low + (high - low) * max(0.0, rank - seen) / count
        seen += count
    return None


class Latencies:
    """Listens to a client's outputs, from its making on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.first, self.between = Histogram(), Histogram()
        self._clock, self._began = clock, clock()
        self._last: dict[tuple[str, int], float] = {}
        """When each sequence put out its newest token."""

    def note(self, stream: Stream, output: SequenceOutput) -> None:
        key, now, count = (output.request_id, output.index), self._clock(), len(output.token_ids)
        if count:
            last = self._last.get(key)
            if last is not None:
                self.between.add((now - last) / count, count, now)
            elif stream.submitted >= self._began:  # what was in flight before has had its first token, or may have
                self.first.add(now - stream.submitted, 1, now)
            self._last[key] = now
        if output.finish_reason is not None:
            self._last.pop(key, None)

    def forget(self, live: set[tuple[str, int]]) -> None:
        """Sequences that are not among ``live`` have ended without saying so: their clients hung up."""
        for key in self._last.keys() - live:
            del self._last[key]

    def counts(self) -> tuple[list[int], list[int]]:
        """Of first tokens, and between tokens."""
        now = self._clock()
        return self.first.counts(now), self.between.counts(now)
