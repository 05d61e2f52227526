"""Who goes: whom a running sequence preempts that can't get a block, and whom one that waits.

A running sequence that can't get a block preempts one that comes after it (or goes itself). Nobody is preempted by those behind, and
the first alone always fits (the engine refuses what does not), so every sequence ends. One that waits preempts only those of a lower
priority, where it can't have a row or memory otherwise.

What becomes of the victim: ``Scheduler.preempt``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.core.admitting import MAX_LOOKED_AT, MAX_PARTIAL_PROMPTS, is_crowd
from quire.core.holding import KnownToWait, sibling

if TYPE_CHECKING:
    from quire.core.scheduler import Scheduler
    from quire.core.sequence import Group, Sequence


def make_way(scheduler: Scheduler) -> None:
    """Whoever waits and has a higher priority than the last running sequence takes its row, where none is free, and its memory,
    where the last step had none for the first of them."""
    waiting, running = scheduler.waiting, scheduler.running
    head = scheduler.early or (waiting[0] if waiting else None)
    if head is None or not running or head.order[0] >= running[-1].order[0]:
        return
    if scheduler.refused is head or (scheduler.short and (head is scheduler.early or scheduler.manager.groups.windowed)):
        reason = f"request {head.request.request_id} has a higher priority, and needs its memory"
        scheduler.preempt(len(running) - 1, "order", reason)
    could_start, spare, most = CouldStart(scheduler), scheduler.num_free_rows, MAX_LOOKED_AT
    for seq in list(waiting):
        if not most or not running or seq.order[0] >= running[-1].order[0]:
            return
        if not could_start(seq):  # a row would be free in vain
            continue
        most -= 1
        if spare:
            spare -= 1
        else:
            scheduler.preempt(len(running) - 1, "order", f"request {seq.request.request_id} has a higher priority, and needs its row")


class CouldStart:
    """Tells of one waiting sequence after the other whether it would not be passed over (admitting.py) if it had a row, as those before
    it have then."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._manager = scheduler.manager
        self._known_to_wait = KnownToWait(scheduler.manager)
        running, early = scheduler.running, scheduler.early
        self._partial = [seq.order[0] for seq in running if len(seq.tokens) - seq.num_computed > 1 and seq is not early]
        """Priorities of the prompts that are computed in chunks."""
        self._part = max(1, (scheduler.max_num_batched_tokens - len(running)) // (MAX_PARTIAL_PROMPTS + 1))
        """Positions of a prompt that is computed at once also beside those."""
        self._groups: set[Group] = set()
        """Those whose first sample starts, so that the others wait for their prompt; or can't, so that no other can."""
        self._looks = MAX_LOOKED_AT

    def __call__(self, seq: Sequence) -> bool:
        group = seq.group
        if seq.candidates is not None or seq.in_flight or group in self._groups or self._known_to_wait(seq):
            return False
        several = len(group.sequences) > 1
        if several and sibling(self._manager, seq)[0] is not None:  # it shares the prompt
            return True
        if seq.lack is None:
            if not self._looks:
                return False
            self._looks -= 1
            seq.lack = max(1, seq.num_tokens - max(self._manager.match(seq).num_positions, seq.num_swapped))
        if several:
            self._groups.add(group)
        if seq.lack > self._part:
            if is_crowd(seq, self._partial):
                return False
            self._partial.append(seq.order[0])
        return True


def shorten_early(scheduler: Scheduler, early: Sequence, i: int) -> int:
    """The one that started early gives its last block back for running[i]; all of them where windows have left what it would see again.
    Returns where the other is among the running ones then."""
    lost = scheduler.manager.shrink(early)
    if lost is not None:
        scheduler.manager.counters.tokens_recomputed += lost
        return i
    at, request = scheduler.running.index(early), scheduler.running[i].request
    scheduler.preempt(at, "memory", f"it had started early, in memory that request {request.request_id} needs now")
    return i - (at < i)


def choose_victim(scheduler: Scheduler, i: int) -> int:
    """Whom to preempt for running[i]: of those behind it with the lowest priority, the one that has least to compute again;
    itself where nobody is behind it."""
    running = scheduler.running
    behind = [j for j in range(i + 1, len(running)) if running[j] is not scheduler.early]
    if not behind:
        return i
    lowest = running[behind[-1]].order[0]
    behind = [j for j in behind if running[j].order[0] == lowest]
    return min(behind, key=lambda j: (running[j].num_computed, -j))
