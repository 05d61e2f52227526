"""Scheduler: decides what runs in a step, who is admitted, who is preempted.

A step has a budget of token positions. Running sequences come first, in their order (priority, then arrival): each computes
what it lacks, one position while it decodes, a chunk while its prompt is long; prompts share what the decodes leave, so that
a long one does not keep a short one waiting. What is left of the budget admits waiting sequences in the same order, as far
as the admission policy lets them into the pool.

A waiting sequence is passed over while somebody else computes what it would compute next: the prompt of its own request, or
an equal prefix. It finds the blocks a step later.

The head of the queue may start *early*, with the part of its prompt that memory is free for; it gives blocks back one by one
before anybody is preempted, and is like any other as soon as all of it fits.

Where steps overlap (flight.py), a sequence is planned while its newest token is still on the device. Left out are those that need that
token to go on, those that it ends whatever it is, and those that were preempted meanwhile, until it is read.

A running sequence that can't get a block preempts one that comes after it (or goes itself): the victim's blocks are freed,
though still findable, or swapped out, and it waits at its place in the queue. Nobody is preempted by those behind, and the
first alone always fits (the engine refuses what does not), so every sequence ends. One that waits preempts only those of a lower
priority, where it can't have a row or memory otherwise.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

from quire.core.admission import AdmissionPolicy, expected_footprint, footprint
from quire.core.block_manager import BlockManager
from quire.core.events import Listener, Preempted, PreemptionCause
from quire.core.flight import Flight, brings, commit, launch
from quire.core.holding import Computing, is_held, sibling
from quire.core.plan import RowStart, RowWork, StepPlan, StepResult
from quire.core.prefix_cache import NOTHING, Match
from quire.core.sequence import Sequence, Status
from quire.core.speculation import Speculation
from quire.core.stats import Queue, StepCounters, WaitsFor
from quire.outputs import SequenceOutput

MAX_PARTIAL_PROMPTS = 4
"""Prompts that are computed in chunks at the same time; with more of them each would only finish later."""
MAX_LOOKED_AT = 64
"""Waiting sequences that are looked at in a step; those that are known to wait for another's prompt do not count."""

MOST_WAITING = 4
"""Where more than one in so many running sequences needs what is in flight for its next step, no step is planned before that is read:
without them it would cost nearly as much as with them, and they would run in every other step only."""

_order = attrgetter("order")


def _ask(work: RowWork, seq: Sequence) -> None:
    """What the step, as far as it goes, is to give back of ``seq``."""
    end = work.start + work.count
    work.sample = end == len(seq.tokens) + seq.in_flight and seq.max_tokens > 0
    if seq.unscored:
        work.score = range(seq.unscored.start, min(end, seq.unscored.stop))
        assert not work.score or work.score.start >= work.start, "positions were skipped that are to be scored"


TRUST = 64
"""Steps that succeed before twice as many positions are tried again."""


class Scheduler:
    """Plans steps over ``max_num_seqs`` rows and ``max_num_batched_tokens`` positions a step.

    swap: a preempted sequence's blocks go to the swap pool, as far as it has room. speculation: None where no token is guessed.
    clock: seconds.
    """

    def __init__(
        self,
        manager: BlockManager,
        policy: AdmissionPolicy,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        swap: bool = False,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.manager = manager
        self.policy = policy
        self.max_num_batched_tokens = self._most_tokens = max_num_batched_tokens
        """Less than was asked for after a step for which the device had no memory."""
        self._successes = 0
        """Steps since then."""
        self.waiting: list[Sequence] = []
        """In order."""
        self.running: list[Sequence] = []
        """In order; a preempted sequence that comes back takes its old place."""
        self.counters = StepCounters()
        self.listener: Listener | None = None
        self._swap = swap
        self._clock = clock
        self.speculation = speculation
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._planned: list[Sequence] = []
        """The sequences of the plan's work."""
        self._flights: deque[Flight] = deque()
        """Steps that were planned and not read, the oldest first: at most one when the next is planned."""
        self.early: Sequence | None = None
        """A running sequence that has not room for all of its prompt: it computes what it can in memory that nobody is expected
        to need soon, and gives it back, the last block first, before anybody is preempted. Nobody comes in before it fits."""
        self.short = False
        """The last plan left a sequence waiting for want of memory."""
        self._refused: Sequence | None = None
        """There was no room for it. It need not be looked at again before somebody gives memory back."""

    @property
    def num_free_rows(self) -> int:
        return len(self._rows)

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_order)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._vacate(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        self.manager.free(seq)
        seq.group.sequences.remove(seq)
        seq.status = Status.FINISHED

    def schedule(self) -> StepPlan:
        """The next step. Empty (no work) where nothing is waiting or running, or where what is in flight has to be read first."""
        plan = StepPlan()
        if self._flights and self._should_read():
            return plan
        self._planned = []
        self._make_way()
        self.short = False
        before = self.manager.counters.preemptions
        prompts = [seq for seq in self.running if len(seq.tokens) - seq.num_computed > 1 and seq is not self.early]
        budget = self._continue(plan, prompts)
        if self.manager.counters.preemptions == before:
            budget = self._admit(plan, prompts, budget)
            self._spend(plan, budget)
            if self.speculation is not None:
                self.speculation.extend(plan, self._planned, self.running)
        else:
            self.short = True
        # Beams that wait for another beam hold memory without using it: they give way rather than block it.
        while not plan.work and not self._flights and (self.waiting or self.early) and (idle := self._idle_beams()):
            reason = "beams that wait for another beam of their search held the memory that it needs"
            self.preempt(self.running.index(idle[-1]), "beams", reason)
            self._admit(plan, [], self.max_num_batched_tokens)
        for work, seq in zip(plan.work, self._planned, strict=True):
            if seq.constraint is not None and work.sample and not work.draft:
                work.masks = (seq.constraint.mask,)
        if plan.work:
            plan.copies = self.manager.take_copies()
            self._flights.append(Flight(plan, self._planned))
        return plan

    def launch(self, plan: StepPlan) -> None:
        """The step that was planned last is on its way to the device, and ``schedule`` may be called again before its ``commit``."""
        flight = self._flights[-1]
        assert flight.plan is plan, "the last plan is launched"
        assert len(self._flights) <= 2, "one step is planned ahead"
        launch(self, flight)

    def retreat(self, plan: StepPlan) -> None:
        """The device had no memory for the last plan's step. Its sequences make way and come again, a few at a time: steps compute at
        most half as many positions from now on, until enough of them have succeeded to try twice as many."""
        flight = self._flights.pop()
        assert flight.plan is plan, "the last plan has failed"
        self.max_num_batched_tokens = max(1, plan.num_tokens // 2)
        self._successes = 0
        reason = f"the device had no memory left for a step of {plan.num_tokens:,} positions"
        for seq in flight.sequences:
            if seq.status is Status.RUNNING:
                self.preempt(self.running.index(seq), "device", reason)

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """The oldest plan's step has given ``result``. What it added to each sequence, in the plan's order."""
        flight = self._flights.popleft()
        assert flight.plan is plan, "steps are read in the order in which they were launched"
        if self.max_num_batched_tokens < self._most_tokens:
            self._successes += 1
            if self._successes % TRUST == 0:
                self.max_num_batched_tokens = min(2 * self.max_num_batched_tokens, self._most_tokens)
        return commit(self, flight, result)

    def check(self, live: list[Sequence]) -> None:
        """Prove the accounts of all ``live`` sequences. Raises AssertionError."""
        self.manager.check(live)
        assert len(live) == len(self.running) + len(self.waiting), "a live sequence is neither running nor waiting"
        assert self.running == sorted(self.running, key=_order), "the running sequences are not in order"
        assert self.waiting == sorted(self.waiting, key=_order), "the queue is not in order"
        rows = [seq.row for seq in self.running]
        assert len(set(rows + self._rows)) == len(rows) + len(self._rows), "a row is used twice"
        assert self.early is None or self.early in self.running
        in_flight: Counter[Sequence] = Counter()
        for flight in self._flights:
            in_flight.update({seq: brings(work, seq) for work, seq in zip(flight.plan.work, flight.sequences, strict=True)})
        for seq in live:
            assert seq.in_flight == in_flight[seq], f"{seq.in_flight} tokens in flight, and launched steps bring {in_flight[seq]}"
        for seq in self.running:
            assert seq.status is Status.RUNNING
            assert seq.row >= 0
        for seq in self.waiting:
            assert seq.status is Status.WAITING
            assert seq.row < 0
            assert not seq.block_table, "a waiting sequence holds blocks"

    def queue(self) -> Queue:
        """What the waiting sequences wait for."""
        counts: Counter[str] = Counter(map(self.waits_for, self.waiting))
        return Queue(**counts)

    def waits_for(self, seq: Sequence) -> WaitsFor:
        """What a waiting sequence waited for in the last step."""
        if is_held(seq) or seq.candidates is not None or sibling(self.manager, seq)[1]:
            return "prompt"
        if not self._rows:
            return "rows"
        return "memory" if self.short else "budget"

    # Who runs.

    def _should_read(self) -> bool:
        """Too many of the running sequences can't go on before the step in flight is read."""
        return sum(seq.waits for seq in self.running) * MOST_WAITING > len(self.running)

    def _idle_beams(self) -> list[Sequence]:
        return [seq for seq in self.running if seq.candidates is not None]

    def _continue(self, plan: StepPlan, prompts: list[Sequence]) -> int:
        """Plan the running sequences; returns what is left of the budget."""
        manager, size = self.manager, self.manager.block_size
        running = self.running
        budget = self.max_num_batched_tokens
        shares = {}
        if prompts:
            idle = sum(seq.candidates is not None for seq in running) + (self.early is not None)
            shares = self._shares(prompts, budget - (len(running) - len(prompts) - idle))
        i = 0
        while i < len(running) and budget > 0:
            seq = running[i]
            # The one that started early takes what the others leave.
            if seq is self.early or (seq.in_flight and (seq.waits or seq.ends)):
                i += 1
                continue
            start = seq.num_computed
            count = len(seq.tokens) + seq.in_flight - start
            if count > 1:
                count = min(shares[seq.row], budget)
                if count == 0:
                    if plan.work:
                        i += 1
                        continue
                    count = 1  # somebody goes on, whatever the others need
            elif count == 0:
                if seq.candidates is not None:  # a beam that waits for the others
                    i += 1
                    continue
                start, count = start - 1, 1
            if start + count > len(seq.block_table) * size or seq.shared_tail:
                while not manager.grow(seq, start + count):
                    if self.early is not None and self.early.block_table:
                        manager.counters.tokens_recomputed += manager.shrink(self.early)
                        continue
                    victim = self._victim(i)
                    self.preempt(victim, "memory", f"no free block was left for request {seq.request.request_id}")
                    if victim == i:
                        break
                if seq.status is not Status.RUNNING:
                    continue
            self._plan(plan, seq, start, count)
            budget -= count
            i += 1
        return budget

    def _shares(self, prompts: list[Sequence], rest: int) -> dict[int, int]:
        """Row → positions of this step for each unfinished prompt: equal parts of ``rest``, the newcomers counting as one more;
        what a short one leaves goes to the others."""
        parts = len(prompts) + (1 if self.waiting and self._rows and len(prompts) < MAX_PARTIAL_PROMPTS else 0)
        shares = {}
        for seq in sorted(prompts, key=lambda s: s.num_tokens - s.num_computed):
            shares[seq.row] = count = max(0, min(seq.num_tokens - seq.num_computed, rest // parts))
            rest -= count
            parts -= 1
        return shares

    def _spend(self, plan: StepPlan, budget: int) -> None:
        """What newcomers did not take of the budget goes to the planned prompts, in order."""
        for work, seq in zip(plan.work, self._planned, strict=True):
            if budget <= 0:
                return
            end = work.start + work.count
            extra = min(len(seq.tokens) - end, budget)
            # A tail that was shared in this step stays as it was planned: a copy would come too late.
            if extra > 0 and seq is not self.early and not seq.shared_tail and self.manager.grow(seq, end + extra):
                budget -= extra
                work.count += extra
                _ask(work, seq)
                work.new_blocks = seq.block_table[work.first_block :]
                seq.num_sent = len(seq.block_table)

    def _plan(self, plan: StepPlan, seq: Sequence, start: int, count: int) -> None:
        table = seq.block_table
        blocks, first = [], seq.num_sent
        if first < len(table):
            blocks, seq.num_sent = table[first:], len(table)
        work = RowWork(seq.row, start, count, blocks, False, first)
        _ask(work, seq)
        if not seq.started:
            seq.started = True
            seq.unsent.clear()
            search = seq.group.search
            candidates = 0 if search is None else search.num_candidates
            request = seq.request
            plan.starts.append(
                RowStart(seq.row, seq.tokens, seq.num_prompt, seq.params, seq.seed, seq.stop_ids, candidates, request.pooling)
            )
        elif seq.unsent:
            work.tokens, seq.unsent = seq.unsent, []
        if start < seq.num_computed:
            work.write = False
        plan.work.append(work)
        self._planned.append(seq)

    # Who comes in.

    def _admit(self, plan: StepPlan, prompts: list[Sequence], budget: int) -> int:
        """Start waiting sequences, in order, as far as rows, memory, policy and ``budget`` allow; returns what is left of it."""
        gave_way = False
        if self.early is not None:
            if not self.waiting or self.waiting[0].order > self.early.order:
                return self._go_on(plan, self.early, prompts, budget)
            self.preempt(self.running.index(self.early), "order", f"request {self.waiting[0].request.request_id} comes before it")
            gave_way = True
        if not self.waiting or not self._rows or budget <= 0:
            return budget
        manager = self.manager
        # All that a sequence has to compute must fit beside what the running ones still have to (the rest of a chunked
        # prompt), though it is allocated chunk by chunk.
        room = manager.pool.num_free - sum(manager.lacking(seq) for seq in prompts)
        surveyed = False
        partial = len(prompts)
        computing = Computing(manager, prompts)
        i = looked_at = 0
        while i < len(self.waiting) and looked_at < MAX_LOOKED_AT and self._rows and budget > 0:
            seq = self.waiting[i]
            if seq is self._refused:
                self.short = True
                return budget
            if is_held(seq):
                i += 1
                continue
            seq.held = None
            looked_at += 1
            parent, wait = sibling(manager, seq)
            if seq.candidates is not None or seq.in_flight or wait:
                i += 1
                continue
            fresh_fork = parent is not None and seq.num_tokens == seq.num_prompt
            match = NOTHING if fresh_fork else manager.match(seq)
            if seq.host_blocks is not None or match.num_positions > seq.num_prompt:
                parent = None
            start = match.num_positions if parent is None else seq.num_prompt
            lack = max(1, seq.num_tokens - max(start, seq.num_swapped))
            if (parent is None and start < seq.num_tokens and computing.hold(seq, match)) or (
                lack > budget and partial >= MAX_PARTIAL_PROMPTS
            ):
                i += 1
                continue
            need = manager.need(seq, match) if parent is None else manager.need_fork(seq)
            shared = manager.shared(match) if parent is None else seq.num_prompt // manager.block_size
            if self.running and not surveyed:
                self.policy.survey([footprint(s) for s in self.running], manager.pool.num_free)
                surveyed = True
            if need > room or (self.running and not self.policy.admits(expected_footprint(seq, shared))):
                # Early, where nobody who comes before it waits, nor a sample that would share what it holds.
                alone = i == 0 and not gave_way and len(seq.group.sequences) == 1
                if alone and lack > 1 and seq.host_blocks is None and not manager.cache.window:
                    spare = min(self.policy.room(), room) if self.running else room
                    if spare > need - manager.blocks_for(lack):
                        return self._start_early(plan, seq, match, spare, budget)
                self.short = True
                # A window gives memory back while a sequence runs; without one the pool only fills until somebody leaves.
                self._refused = None if manager.cache.window else seq
                return budget
            room -= need
            del self.waiting[i]
            self._enter(seq, parent, match)
            count = min(lack, budget)
            if count < lack:
                partial += 1
            if lack > 1:
                computing.add(seq)
            begin = seq.num_tokens - lack
            grown = manager.grow(seq, begin + count)
            assert grown, "the blocks of an admitted sequence were counted before"
            self._plan(plan, seq, begin, count)
            budget -= count
        return budget

    def _start_early(self, plan: StepPlan, seq: Sequence, match: Match, spare: int, budget: int) -> int:
        """The head of the queue, for whose prompt there is not room enough, begins in ``spare`` blocks."""
        need = self.manager.need(seq, match)
        self.waiting.remove(seq)
        self._enter(seq, None, match)
        self.early, self.short = seq, True
        return self._begin(plan, seq, spare - (need - self.manager.lacking(seq)), budget)

    def _go_on(self, plan: StepPlan, seq: Sequence, prompts: list[Sequence], budget: int) -> int:
        """The sequence that started early: it is one like any other if it fits now, else it computes what there is room for."""
        if seq is self._refused or budget <= 0:
            self.short = True
            return budget
        manager = self.manager
        others = [footprint(s) for s in self.running if s is not seq]
        room = manager.pool.num_free - sum(manager.lacking(s) for s in prompts)
        need = manager.lacking(seq)
        self.policy.survey(others, manager.pool.num_free)
        if need <= room and (not others or self.policy.admits(footprint(seq))):
            self.early = None
            return self._begin(plan, seq, need, budget)
        self.short = True
        left = self._begin(plan, seq, min(self.policy.room(), room, need - 1), budget)
        if left == budget:
            self._refused = seq
        return left

    def _begin(self, plan: StepPlan, seq: Sequence, blocks: int, budget: int) -> int:
        """Compute what fits into ``blocks`` more blocks of a running sequence's prompt; returns what is left of the budget."""
        end = (len(seq.block_table) + max(0, blocks)) * self.manager.block_size
        count = min(seq.num_tokens, end) - seq.num_computed
        if self.early is seq:  # the last position would make it a sequence that grows
            count = min(count, seq.num_tokens - 1 - seq.num_computed)
        count = min(count, budget)
        if count > 0 and self.manager.grow(seq, seq.num_computed + count):
            self._plan(plan, seq, seq.num_computed, count)
            budget -= count
        return budget

    def _enter(self, seq: Sequence, parent: Sequence | None, match: Match) -> None:
        """A waiting sequence gets a row, and the blocks that are there for it."""
        manager = self.manager
        if parent is not None:
            manager.fork(parent, seq, seq.num_prompt)
        else:
            manager.start(seq, match)
        counters, group = manager.counters, seq.group
        counters.tokens_recomputed += max(0, seq.num_lost - seq.num_computed)
        seq.num_lost = 0
        if group.cached_tokens is None:  # the last position is computed in any case
            group.cached_tokens = min(seq.num_computed, seq.num_prompt - 1)
            counters.prompt_tokens += seq.num_prompt
            counters.hit_tokens += group.cached_tokens
            group.queued_s = self._clock() - group.added
        self.run(seq)

    def run(self, seq: Sequence) -> None:
        """``seq``, which has its blocks, takes a row. There must be one."""
        seq.row = self._rows.pop()
        seq.started = False
        seq.status = Status.RUNNING
        if self.running and self.running[-1].order > seq.order:
            insort(self.running, seq, key=_order)
        else:
            self.running.append(seq)

    # Who goes.

    def _make_way(self) -> None:
        """Whoever waits and has a higher priority than the last running sequence takes its row, where none is free, and its memory,
        where the last step had none for the first of them."""
        waiting, running = self.waiting, self.running
        head = self.early or (waiting[0] if waiting else None)
        if head is None or not running or head.order[0] >= running[-1].order[0]:
            return
        if self._refused is head or (self.short and (head is self.early or self.manager.cache.window)):
            self.preempt(len(running) - 1, "order", f"request {head.request.request_id} has a higher priority, and needs its memory")
        ready = [seq for seq in waiting[:MAX_LOOKED_AT] if seq.candidates is None and not seq.in_flight and not is_held(seq)]
        for seq in ready[len(self._rows) :]:
            if not running or seq.order[0] >= running[-1].order[0]:
                return
            self.preempt(len(running) - 1, "order", f"request {seq.request.request_id} has a higher priority, and needs its row")

    def _victim(self, i: int) -> int:
        """Whom to preempt for running[i]: of those behind it with the lowest priority, the one that has least to compute again;
        itself where nobody is behind it."""
        running = self.running
        behind = [j for j in range(i + 1, len(running)) if running[j] is not self.early]
        if not behind:
            return i
        lowest = running[behind[-1]].order[0]
        behind = [j for j in behind if running[j].order[0] == lowest]
        return min(behind, key=lambda j: (running[j].num_computed, -j))

    def preempt(self, i: int, cause: PreemptionCause, reason: str) -> None:
        """running[i] gives its row and its blocks back, and waits."""
        seq = self.running.pop(i)
        positions = seq.num_computed
        self.manager.counters.preempted[cause] += 1
        seq.group.preemptions += 1
        if seq.in_flight > 1:  # a draft's blocks are not worth keeping
            self.manager.trim(seq)
        pooled = seq.request.pooling is not None
        if pooled:  # the row's vector goes with the row
            seq.unscored = seq.request.scored()
        swapped = self._swap and not pooled and self.manager.swap_out(seq)
        if not swapped:
            self.manager.cache.found(seq.block_table)  # it comes back for its blocks: they go last
            self.manager.free(seq)
            seq.num_lost = positions
        self._vacate(seq)
        seq.status = Status.WAITING
        self.add(seq)
        if self.listener is not None:
            self.listener(Preempted(seq.request.request_id, seq.index, positions, swapped, cause, reason))

    def _vacate(self, seq: Sequence) -> None:
        self._refused = None
        if seq is self.early:
            self.early = None
        self._rows.append(seq.row)
        seq.row = -1
