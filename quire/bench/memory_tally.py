"""Counts what is in a KV pool while it is full, step by step, in time proportional to the running sequences."""

from __future__ import annotations

from collections.abc import Mapping

from quire.core.contiguous import ContiguousManager
from quire.core.plan import StepPlan
from quire.core.scheduler import Scheduler
from quire.core.sequence import Sequence


class Tally:
    """Sums over the steps from the first that left a sequence waiting for memory (or for a row) to the last before the queue
    was empty; over all steps where there was no such step.

    ends: a sequence's seed → positions that it has computed at its end. ``see`` is to be called with each plan when
    it was executed: its positions are written, and nobody has ended yet. What sharing saves is counted between the steps too:
    there a fork still shares the block that it is about to write.
    """

    def __init__(self, scheduler: Scheduler, ends: Mapping[int, int]) -> None:
        self.more = True
        """There are requests that the engine does not know yet."""
        self.saturated = False
        self.limited_by_rows = False
        self.max_sequences = 0
        self._scheduler = scheduler
        self._manager = scheduler.manager
        self._ends = ends
        self._contiguous = isinstance(scheduler.manager, ContiguousManager)
        self._done = self._counted = False
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        # Sums over steps, in positions but for the last three.
        self.tokens = self.reserved = self.owned = self.sequences = 0
        self.saved = self.saved_in_step = 0.0

    @property
    def positions(self) -> int:
        """Positions of the pool, summed over steps."""
        return self.steps * self._manager.pool.num_blocks * self._manager.block_size

    def see(self, plan: StepPlan) -> None:
        scheduler = self._scheduler
        running, waiting = scheduler.running, bool(scheduler.waiting)
        self.max_sequences = max(self.max_sequences, len(running))
        full = waiting and scheduler.num_free_rows == 0
        self.limited_by_rows = self.limited_by_rows or full
        if not self.saturated and (full or scheduler.short):
            self.saturated = True
            self._clear()
        if self.saturated and not waiting and not self.more:
            self._done = True
        self._counted = not self._done
        if self._counted:
            self._count(running, {work.row: work.start + work.count for work in plan.work})

    def see_between(self) -> None:
        """To be called after each step."""
        if self._counted:
            self.saved += self._saved_share()

    def _count(self, running: list[Sequence], computed: Mapping[int, int]) -> None:
        """computed: row → positions that are computed, for the rows of the step."""
        pool, size, width = self._manager.pool, self._manager.block_size, self._manager.width
        owned = pool.num_owned * size
        ends = self._ends
        tokens = reserved = 0
        if self._contiguous:
            for seq in running:
                filled = computed.get(seq.row, seq.num_computed)
                tokens += filled
                reserved += ends[seq.seed] - filled
        else:
            # Last block → positions in it that hold tokens, positions that will, and how many tables it is the last of.
            last: dict[int, tuple[int, int, int]] = {}
            for seq in running:
                if not (table := seq.block_table):
                    continue
                before = (len(table) // width - 1) * size
                fill, will = computed.get(seq.row, seq.num_computed) - before, min(size, ends[seq.seed] - before)
                for block in table[-width:]:
                    other = last.get(block, (0, 0, 0))
                    last[block] = max(fill, other[0]), max(will, other[1]), other[2] + 1
            tokens, owners = owned, pool.ref_counts
            for block, (fill, will, tables) in last.items():
                if fill < size and tables == owners[block]:  # where it is not the last of some table, it is full
                    tokens -= size - fill
                    reserved += will - fill
        self.steps += 1
        self.tokens += tokens
        self.reserved += reserved
        self.owned += owned
        self.sequences += len(running) - (self._scheduler.early is not None)
        self.saved_in_step += self._saved_share()

    def _saved_share(self) -> float:
        """Of the blocks that all tables name: those that sharing saves."""
        pool = self._manager.pool
        return 1 - pool.num_owned / pool.num_references if pool.num_references else 0.0
