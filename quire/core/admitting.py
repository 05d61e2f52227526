"""Who comes in: waiting sequences start, in their order, in what the running ones leave of a step and of the pool.

Each is one of these:

    passed over     somebody else computes what it would compute next, its newest token is not known yet, or it would be one prompt
                    in chunks too many
    admitted        there is room for all that it has to compute, and the policy lets it in (admission.py)
    started early   there is not, but it is the head of the queue, and there is room for a part of its prompt
    refused         else; nobody behind it is looked at, so that whoever needs much does not wait for ever

Somebody else computes the prompt of its own request, or an equal prefix (holding.py): it finds the blocks a step later.

One that started *early* gives blocks back one by one before anybody is preempted, and all of them when one that comes before it
waits. It is like any other as soon as all of it fits. Where windows have left what it would see again, it can't go back block by block: it
is preempted then, and does not start early a second time, so that nothing is computed in vain twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core.admission import expected_footprint, footprint
from quire.core.holding import Computing, KnownToWait, sibling
from quire.core.prefix_cache import NOTHING, Match
from quire.core.sequence import Group, Sequence

if TYPE_CHECKING:
    from quire.core.plan import StepPlan
    from quire.core.scheduler import Scheduler

MAX_PARTIAL_PROMPTS = 4
"""Prompts that are computed in chunks at the same time; with more of them each would only finish later."""
MAX_LOOKED_AT = 64
"""Waiting sequences that are looked at in a step; those that are known to wait for another's prompt do not count, nor those that are known
to be one prompt in chunks too many."""


def admit(scheduler: Scheduler, plan: StepPlan, prompts: list[Sequence], budget: int) -> int:
    """Start waiting sequences, in order, as far as rows, memory, policy and ``budget`` allow; returns what is left of it.

    prompts: the running sequences with more than one position to compute, without the one that started early.
    """
    waiting, early = scheduler.waiting, scheduler.early
    if early is not None:
        if not waiting or waiting[0].order > early.order:
            return _go_on(scheduler, plan, early, prompts, budget)
        scheduler.preempt(scheduler.running.index(early), "order", f"request {waiting[0].request.request_id} comes before it")
    if not waiting or not scheduler.num_free_rows or budget <= 0:
        return budget
    newcomers = Newcomers(scheduler, plan, prompts, budget)
    newcomers.admit(may_start_early=early is None)
    return newcomers.budget


def is_crowd(seq: Sequence, partial: list[int]) -> bool:
    """Whether ``seq`` would be one prompt in chunks too many. partial: the priorities of those that are computed so."""
    return sum(order <= seq.order[0] for order in partial) >= MAX_PARTIAL_PROMPTS


@dataclass(slots=True)
class Newcomer:
    """A waiting sequence that is not passed over, and what it would begin with."""

    seq: Sequence
    parent: Sequence | None
    """Whose prompt's blocks it would share: a running sequence of its request."""
    match: Match
    """What it would begin with where it has no parent."""
    lack: int
    """Positions that it has to compute."""
    need: int
    """Free blocks that it takes until they are computed."""
    shared: int
    """Logical blocks to begin with that others own."""


class Newcomers:
    """The waiting sequences that start in one step: each takes from ``budget``, and from the blocks that are free."""

    def __init__(self, scheduler: Scheduler, plan: StepPlan, prompts: list[Sequence], budget: int) -> None:
        self.budget = budget
        self._scheduler = scheduler
        self._plan = plan
        self._room = _room(scheduler, prompts)
        self._partial = [seq.order[0] for seq in prompts]
        """Priorities of the prompts that are computed in chunks."""
        self._computing = Computing(scheduler.manager, prompts)
        self._known_to_wait = KnownToWait(scheduler.manager)
        self._crowded: set[Group] = set()
        """Requests whose prompt is one too many, for all of their samples."""
        self._surveyed = False

    def admit(self, may_start_early: bool) -> None:
        """Go through the queue, as far as rows and budget last, up to the first for whom there is no memory.

        may_start_early: False where one that had started early has just given way.
        """
        scheduler, waiting = self._scheduler, self._scheduler.waiting
        i = looked_at = 0
        while i < len(waiting) and looked_at < MAX_LOOKED_AT and scheduler.num_free_rows and self.budget > 0:
            seq = waiting[i]
            if seq is scheduler.refused:
                scheduler.short = True
                return
            if self._known_to_wait(seq) or self._is_crowded(seq):
                i += 1
                continue
            looked_at += 1
            newcomer = self._look_at(seq)
            if newcomer is None:
                i += 1
            elif self._fits(newcomer):
                del waiting[i]
                self._start(newcomer)
            else:
                scheduler.short = True
                if i == 0 and may_start_early and self._start_early(newcomer):
                    return
                # A window gives memory back while a sequence runs; without one the pool only fills until somebody leaves.
                if not scheduler.manager.groups.windowed:
                    scheduler.refused = seq
                return

    def _look_at(self, seq: Sequence) -> Newcomer | None:
        """What ``seq`` would begin with; None where it is passed over."""
        manager = self._scheduler.manager
        seq.held = None
        if seq.candidates is not None or seq.in_flight:
            return None
        parent, _ = sibling(manager, seq)
        fresh_fork = parent is not None and seq.num_tokens == seq.num_prompt
        match = NOTHING if fresh_fork else manager.match(seq)
        if seq.host_blocks is not None or match.num_positions > seq.num_prompt:
            parent = None
        start = match.num_positions if parent is None else seq.num_prompt
        lack = seq.lack = max(1, seq.num_tokens - max(start, seq.num_swapped))
        if parent is None and start < seq.num_tokens and self._computing.hold(seq, match):
            return None
        if self._is_crowded(seq):
            return None
        if parent is None:
            return Newcomer(seq, None, match, lack, manager.needs.start(seq, match), manager.needs.shared(match))
        return Newcomer(seq, parent, match, lack, manager.needs.fork(seq), seq.num_prompt // manager.block_size)

    def _is_crowded(self, seq: Sequence) -> bool:
        """It would be one prompt in chunks too many, as far as that is known."""
        fresh = seq.num_tokens == seq.num_prompt
        if fresh and seq.group in self._crowded:
            return True
        if seq.lack is None or seq.lack <= self.budget or not is_crowd(seq, self._partial):
            return False
        if fresh:
            self._crowded.add(seq.group)
        return True

    def _fits(self, newcomer: Newcomer) -> bool:
        """There is room for all that it has to compute, and the policy lets it in, which is not asked where nobody runs."""
        running, policy, manager = self._scheduler.running, self._scheduler.policy, self._scheduler.manager
        if running and not self._surveyed:
            policy.survey([footprint(seq, manager.block_size, manager.groups) for seq in running], manager.pool.num_free)
            self._surveyed = True
        if newcomer.need > self._room:
            return False
        return not running or policy.admits(expected_footprint(newcomer.seq, newcomer.shared, manager.block_size, manager.groups))

    def _start(self, newcomer: Newcomer) -> None:
        """It computes all that it has to, or as much as the budget allows. All of it must fit."""
        scheduler, seq, lack = self._scheduler, newcomer.seq, newcomer.lack
        self._room -= newcomer.need
        self._enter(newcomer)
        count = min(lack, self.budget)
        if count < lack:
            self._partial.append(seq.order[0])
        if lack > 1:
            self._computing.add(seq)
        begin = seq.num_tokens - lack
        grown = scheduler.manager.grow(seq, begin + count)
        assert grown, "the blocks of an admitted sequence were counted before"
        scheduler.add_work(self._plan, seq, begin, count)
        self.budget -= count

    def _start_early(self, newcomer: Newcomer) -> bool:
        """The head of the queue, which does not fit, begins in memory that nobody is expected to need soon. False, with nothing
        changed, where there is none; for one of several samples, which would share what it holds; after a swap; and under a window after
        a preemption."""
        scheduler, seq = self._scheduler, newcomer.seq
        manager = scheduler.manager
        if newcomer.lack == 1 or len(seq.group.sequences) > 1 or seq.host_blocks is not None:
            return False
        if manager.groups.windowed and seq.num_lost:
            return False
        spare = min(scheduler.policy.room(), self._room) if scheduler.running else self._room
        spare -= manager.needs.at_once(newcomer.match)
        if spare < manager.width:
            return False
        del scheduler.waiting[0]
        self._enter(newcomer)
        scheduler.early = seq
        self.budget = _begin(scheduler, self._plan, seq, spare, self.budget)
        return True

    def _enter(self, newcomer: Newcomer) -> None:
        """It gets a row, and the blocks that are there for it."""
        scheduler, seq = self._scheduler, newcomer.seq
        manager = scheduler.manager
        if newcomer.parent is not None:
            manager.fork(newcomer.parent, seq, seq.num_prompt)
        else:
            manager.start(seq, newcomer.match)
        counters, group = manager.counters, seq.group
        counters.tokens_recomputed += max(0, seq.num_lost - seq.num_computed)
        seq.num_lost = 0
        if group.cached_tokens is None:  # the last position is computed in any case
            group.cached_tokens = min(seq.num_computed, seq.num_prompt - 1)
            counters.prompt_tokens += seq.num_prompt
            counters.hit_tokens += group.cached_tokens
            group.queued_s = scheduler.clock() - group.added
        scheduler.run(seq)
        self._known_to_wait.started(seq)


def _go_on(scheduler: Scheduler, plan: StepPlan, early: Sequence, prompts: list[Sequence], budget: int) -> int:
    """The sequence that started early: it is one like any other if it fits now, else it computes what there is room for."""
    if early is scheduler.refused or budget <= 0:
        scheduler.short = True
        return budget
    manager, policy = scheduler.manager, scheduler.policy
    size, groups = manager.block_size, manager.groups
    others = [footprint(seq, size, groups) for seq in scheduler.running if seq is not early]
    room = _room(scheduler, prompts)
    need = manager.needs.rest(early)
    policy.survey(others, manager.pool.num_free)
    if need <= room and (not others or policy.admits(footprint(early, size, groups))):
        scheduler.early = None
        return _begin(scheduler, plan, early, need, budget)
    scheduler.short = True
    left = _begin(scheduler, plan, early, min(policy.room(), room, need - 1), budget)
    if left == budget and not groups.windowed:
        scheduler.refused = early
    return left


def _begin(scheduler: Scheduler, plan: StepPlan, seq: Sequence, blocks: int, budget: int) -> int:
    """Compute of a running sequence's prompt what the budget allows, if it is early what fits into ``blocks`` more blocks; returns what
    is left of the budget."""
    manager = scheduler.manager
    count = seq.num_tokens - seq.num_computed
    if scheduler.early is seq:  # the last position would make it a sequence that grows
        end = (len(seq.block_table) + max(0, blocks)) // manager.width * manager.block_size
        count = min(count - 1, end - seq.num_computed)
    count = min(count, budget)
    if count > 0 and manager.grow(seq, seq.num_computed + count):
        scheduler.add_work(plan, seq, seq.num_computed, count)
        budget -= count
    return budget


def _room(scheduler: Scheduler, prompts: list[Sequence]) -> int:
    """Free blocks beside those that ``prompts`` still lack: what a newcomer has to compute must fit there whole, though blocks are
    allocated chunk by chunk."""
    manager = scheduler.manager
    return manager.pool.num_free - sum(manager.needs.rest(seq) for seq in prompts)
