"""When requests come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from quire.errors import ConfigError
from quire.workload.requests import TraceRequest


def arrive_at(requests: Sequence[TraceRequest], rate: float, seed: int = 0) -> list[TraceRequest]:
    """The requests as they come at ``rate`` a second on average, one independent of the other (a Poisson process).

    The gaps of a seed are the same at every rate, but for its factor; ``inf`` is all at once. Raises ConfigError.
    """
    if not rate > 0:  # NaN fails this too
        raise ConfigError(f"--rate must be above 0 requests a second (inf: all at once), got {rate:g}")
    random, now, timed = Random(f"{seed}/arrivals").random, 0.0, []
    for request in requests:
        timed.append(replace(request, arrival_s=now / rate))
        now -= math.log(1.0 - random())
    return timed


def sped_up(requests: Sequence[TraceRequest], factor: float) -> list[TraceRequest]:
    """A trace whose requests come ``factor`` times as fast, the first at once, in the order of their times. Raises ConfigError where the
    trace has no times."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"--speedup must be above 0, got {factor:g}")
    times = [request.arrival_s for request in requests if request.arrival_s is not None]
    if len(times) < len(requests):
        raise ConfigError("the trace says lengths, but not when its requests come: pass --rate or --concurrency")
    first = min(times)
    timed = [replace(request, arrival_s=(time - first) / factor) for request, time in zip(requests, times, strict=True)]
    return sorted(timed, key=lambda request: request.arrival_s or 0.0)
