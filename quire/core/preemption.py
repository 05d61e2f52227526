"""Who goes: whom a running sequence preempts that can't get a block, and whom one that waits.

A running sequence that can't get a block preempts one that comes after it (or goes itself). Nobody is preempted by those behind, and
the first alone always fits (the engine refuses what does not), so every sequence ends. One that waits preempts only those of a lower
priority, where it can't have a row or memory otherwise.

What becomes of the victim: ``Scheduler.preempt``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.core.admitting import MAX_LOOKED_AT
from quire.core.holding import is_held

if TYPE_CHECKING:
    from quire.core.scheduler import Scheduler


def make_way(scheduler: Scheduler) -> None:
    """Whoever waits and has a higher priority than the last running sequence takes its row, where none is free, and its memory,
    where the last step had none for the first of them."""
    waiting, running = scheduler.waiting, scheduler.running
    head = scheduler.early or (waiting[0] if waiting else None)
    if head is None or not running or head.order[0] >= running[-1].order[0]:
        return
    if scheduler.refused is head or (scheduler.short and (head is scheduler.early or scheduler.manager.cache.window)):
        reason = f"request {head.request.request_id} has a higher priority, and needs its memory"
        scheduler.preempt(len(running) - 1, "order", reason)
    ready = [seq for seq in waiting[:MAX_LOOKED_AT] if seq.candidates is None and not seq.in_flight and not is_held(seq)]
    for seq in ready[scheduler.num_free_rows :]:
        if not running or seq.order[0] >= running[-1].order[0]:
            return
        scheduler.preempt(len(running) - 1, "order", f"request {seq.request.request_id} has a higher priority, and needs its row")


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
