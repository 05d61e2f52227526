"""What the front (HTTP, text) and the engine say to each other.

Plain data only, no callbacks and no shared objects, so that the same messages can cross a process border.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.sequence import Request
from quire.core.stats import EngineStats
from quire.outputs import SequenceOutput


@dataclass(slots=True, frozen=True)
class Add:
    """Queue a request. Its front has checked it against the engine's limits."""

    request: Request


@dataclass(slots=True, frozen=True)
class Abort:
    """End a request, or only its ``index``-th sequence. Unknown and finished ones are fine: hang-ups race with ends."""

    request_id: str
    index: int | None = None


@dataclass(slots=True, frozen=True)
class GetStats:
    """Answered with ``Stats`` of the same ticket, after every message sent before it was applied."""

    ticket: int


@dataclass(slots=True, frozen=True)
class Stop:
    """Leave the loop; nothing more is answered."""


@dataclass(slots=True, frozen=True)
class Outputs:
    """All that one step added, for all requests: one message a step, not one a token."""

    outputs: list[SequenceOutput]


@dataclass(slots=True, frozen=True)
class Stats:
    ticket: int
    stats: EngineStats


@dataclass(slots=True, frozen=True)
class Died:
    """The engine can't go on; every request in flight is lost."""

    reason: str


ToEngine = Add | Abort | GetStats | Stop
FromEngine = Outputs | Stats | Died
