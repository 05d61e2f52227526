"""Time: of a simulation, which passes when somebody says so, and of this machine."""

from __future__ import annotations

from time import perf_counter, sleep
from typing import Protocol


class Time(Protocol):
    """Seconds from a start of its own."""

    def now(self) -> float: ...
    def wait_until(self, seconds: float) -> None:
        """Returns when ``now`` is at least that."""
        ...


class SimulatedTime:
    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def pass_by(self, seconds: float) -> None:
        self._now += seconds

    def wait_until(self, seconds: float) -> None:
        self._now = max(self._now, seconds)


class RealTime:
    def __init__(self) -> None:
        self._start = perf_counter()

    def now(self) -> float:
        return perf_counter() - self._start

    def wait_until(self, seconds: float) -> None:
        if (left := seconds - self.now()) > 0:
            sleep(left)
