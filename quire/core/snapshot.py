"""Snapshot: every block and every sequence of an engine at one moment, for whoever watches (the page at /, ``quire top``).

A snapshot costs about as much as copying what it holds: the states of the blocks are kept as bytes (block_pool.py), and block tables are
lists of ints. Nothing is kept or counted while nobody watches, and never anything for each token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.core.events import BlockCopied, BlockEvicted, Event, Listener, Preempted
from quire.core.scheduler import Scheduler
from quire.core.sequence import Sequence
from quire.core.stats import EngineStats, WaitsFor

MAX_WAITING = 32
"""Waiting sequences that a snapshot names; all are counted."""
MAX_EVENTS = 4096
"""Copies and evictions that are remembered between two snapshots; older ones are forgotten."""
MAX_PREEMPTIONS = 16


@dataclass(slots=True, frozen=True)
class SequenceView:
    """One sequence. Nothing in it is content: no token, no text."""

    request_id: str
    index: int
    row: int
    """-1 while it waits."""
    num_prompt: int
    num_tokens: int
    num_computed: int
    most_tokens: int
    """Prompt and output together can't become longer."""
    cached_tokens: int | None
    """Of the request's prompt; None before it was admitted."""
    preempted: bool
    """It ran before, and had to give its blocks back."""
    waits_for: WaitsFor | None
    blocks: list[int]
    """Its block table, a block for each group of layers: -1 for what a sliding window has left behind."""


@dataclass(slots=True, frozen=True)
class Snapshot:
    states: bytes
    """block_pool.EMPTY, OWNED or IDLE for each block that was ever handed out; all blocks behind are empty."""
    since: bytes
    """For each of them a float64 of this machine's byte order: when it got its first owner, or lost its last, by the engine's clock."""
    now: float
    """By the same clock."""
    sequences: list[SequenceView]
    """All running ones in their order, then the first that wait."""
    copied: list[int]
    """Blocks that were made by copying another, since the last snapshot."""
    evicted: list[int]
    """Blocks whose cached content had to go, since the last snapshot."""
    preemptions: list[str]
    """The last ones since the last snapshot, in words."""
    stats: EngineStats


@dataclass(slots=True)
class Watch:
    """Somebody's view of an engine, which notes what happens between two snapshots until it is closed. ``clock``: the engine's."""

    scheduler: Scheduler
    clock: Callable[[], float]
    stats: Callable[[], EngineStats]
    stop: Callable[[Listener], None]
    copied: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    evicted: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    preempted: deque[Preempted] = field(default_factory=lambda: deque(maxlen=MAX_PREEMPTIONS))

    def note(self, event: Event) -> None:
        match event:
            case BlockCopied(_, destination):
                self.copied.append(destination)
            case BlockEvicted(block, _):
                self.evicted.append(block)
            case Preempted():
                self.preempted.append(event)

    def snapshot(self) -> Snapshot:
        scheduler, pool = self.scheduler, self.scheduler.manager.pool
        waiting = scheduler.waiting[:MAX_WAITING]
        touched = pool.num_touched
        taken = Snapshot(
            states=bytes(pool.states[:touched]),
            since=pool.since[:touched].tobytes(),
            now=self.clock(),
            sequences=[_view(seq, None) for seq in scheduler.running]
            + [_view(seq, why) for seq, why in zip(waiting, scheduler.waits_for(waiting), strict=True)],
            copied=[block for block in self.copied if block < pool.num_blocks],  # and not in the swap pool
            evicted=list(self.evicted),
            preemptions=[str(event) for event in self.preempted],
            stats=self.stats(),
        )
        self.copied.clear()
        self.evicted.clear()
        self.preempted.clear()
        return taken

    def close(self) -> None:
        self.stop(self.note)


def _view(seq: Sequence, reason: WaitsFor | None) -> SequenceView:
    return SequenceView(
        seq.request.request_id,
        seq.index,
        seq.row,
        seq.num_prompt,
        seq.num_tokens,
        seq.num_computed,
        seq.num_prompt + seq.max_tokens,
        seq.group.cached_tokens,
        seq.num_lost > 0 or seq.host_blocks is not None,
        reason,
        list(seq.block_table),
    )
