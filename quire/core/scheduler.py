"""Scheduler: decides what runs in a step, who is admitted, who is preempted.

A step has a budget of token positions. Running sequences come first, in their order (priority, then arrival): each computes
what it lacks, one position while it decodes, a chunk while its prompt is long; prompts share what the decodes leave, so that
a long one does not keep a short one waiting. What is left of the budget admits waiting sequences in the same order, as far
as the admission policy lets them into the pool (admitting.py).

Where steps overlap (flight.py), a sequence is planned while its newest token is still on the device. Left out are those that need that
token to go on, those that it ends whatever it is, and those that were preempted meanwhile, until it is read.

A running sequence that can't get a block preempts one that comes after it, or goes itself; one that waits preempts those of a lower
priority (preemption.py).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from operator import attrgetter

from quire.core.admission import AdmissionPolicy
from quire.core.admitting import admit, is_crowd
from quire.core.block_manager import BlockManager
from quire.core.events import Listener, Preempted, PreemptionCause
from quire.core.flight import Flight, brings, commit, launch, should_read
from quire.core.holding import KnownToWait
from quire.core.plan import RowStart, RowWork, StepPlan, StepResult
from quire.core.preemption import choose_victim, make_way, shorten_early
from quire.core.sequence import Sequence, Status
from quire.core.speculation import Speculation
from quire.core.stats import Queue, StepCounters, WaitsFor
from quire.outputs import SequenceOutput

TRUST = 64
"""Steps that succeed before twice as many positions are tried again."""

_order = attrgetter("order")


def _ask(work: RowWork, seq: Sequence) -> None:
    """What the step, as far as it goes, is to give back of ``seq``."""
    end = work.start + work.count
    work.sample = end == len(seq.tokens) + seq.in_flight and seq.max_tokens > 0
    if seq.unscored:
        work.score = range(seq.unscored.start, min(end, seq.unscored.stop))
        assert not work.score or work.score.start >= work.start, "positions were skipped that are to be scored"


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
        self._width = manager.width
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
        self.clock = clock
        self.speculation = speculation
        self._swap = swap
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._planned: list[Sequence] = []
        """The sequences of the plan's work."""
        self._flights: deque[Flight] = deque()
        """Steps that were planned and not read, the oldest first: at most one when the next is planned."""
        self.early: Sequence | None = None
        """A running sequence that has not room for all of its prompt: it computes what it can in memory that nobody is expected
        to need soon, and gives it back, the last block first, before anybody else is preempted. Nobody comes in before it fits."""
        self.short = False
        """The last plan left a sequence waiting for want of memory."""
        self.refused: Sequence | None = None
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
        if self._flights and should_read(self.running):
            return plan
        self._planned = []
        make_way(self)
        self.short = False
        before = self.manager.counters.preemptions
        prompts = [seq for seq in self.running if len(seq.tokens) - seq.num_computed > 1 and seq is not self.early]
        budget = self._continue(plan, prompts)
        if self.manager.counters.preemptions == before:
            budget = admit(self, plan, prompts, budget)
            self._spend(plan, budget)
            if self.speculation is not None:
                self.speculation.extend(plan, self._planned, self.running, self.max_num_batched_tokens)
        else:
            self.short = True
        # Beams that wait for another beam hold memory without using it: they give way rather than block it.
        while not plan.work and not self._flights and (self.waiting or self.early) and (idle := self._idle_beams()):
            reason = "beams that wait for another beam of their search held the memory that it needs"
            self.preempt(self.running.index(idle[-1]), "beams", reason)
            admit(self, plan, [], self.max_num_batched_tokens)
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
        counts: Counter[str] = Counter(self.waits_for(self.waiting))
        return Queue(**counts)

    def waits_for(self, waiting: list[Sequence]) -> list[WaitsFor]:
        """What each of some waiting sequences waited for in the last step."""
        known_to_wait = KnownToWait(self.manager)
        return [self._waits_for(seq, known_to_wait) for seq in waiting]

    def _waits_for(self, seq: Sequence, known_to_wait: KnownToWait) -> WaitsFor:
        if seq.candidates is not None or known_to_wait(seq):
            return "prompt"
        if not self._rows:
            return "rows"
        return "memory" if self.short else "budget"

    # Who runs.

    def _idle_beams(self) -> list[Sequence]:
        return [seq for seq in self.running if seq.candidates is not None]

    def _continue(self, plan: StepPlan, prompts: list[Sequence]) -> int:
        """Plan the running sequences; returns what is left of the budget."""
        manager = self.manager
        size, width = manager.block_size, self._width
        running = self.running
        budget = self.max_num_batched_tokens
        shares = {}
        if prompts:
            idle = sum(seq.candidates is not None for seq in running) + (self.early is not None)
            shares = self._shares(prompts, budget - (len(running) - len(prompts) - idle))
        first = self.waiting[0].order[0] if self.waiting and self._rows else None
        i = 0
        while i < len(running) and budget > 0:
            seq = running[i]
            if first is not None and budget == 1 and seq.order[0] > first and plan.work:
                break  # the last position is for one that comes before it and waits
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
            if (start + count) * width > len(seq.block_table) * size or seq.shared_tail:
                while not manager.grow(seq, start + count):
                    if self.early is not None and self.early.block_table:
                        i = shorten_early(self, self.early, i)
                        continue
                    victim = choose_victim(self, i)
                    self.preempt(victim, "memory", f"no free block was left for request {seq.request.request_id}")
                    if victim == i:
                        break
                if seq.status is not Status.RUNNING:
                    continue
            self.add_work(plan, seq, start, count)
            budget -= count
            i += 1
        return budget

    def _shares(self, prompts: list[Sequence], rest: int) -> dict[int, int]:
        """Row → positions of this step for each unfinished prompt: equal parts of ``rest``, the newcomers counting as one more;
        what a short one leaves goes to the others."""
        newcomers = bool(self.waiting and self._rows)
        if newcomers and is_crowd(self.waiting[0], [seq.order[0] for seq in prompts]):
            newcomers = self._short_one_waits(rest // (len(prompts) + 1), max(seq.order[0] for seq in prompts))
        parts = len(prompts) + newcomers
        shares = {}
        for seq in sorted(prompts, key=lambda s: s.num_tokens - s.num_computed):
            shares[seq.row] = count = max(0, min(seq.num_tokens - seq.num_computed, rest // parts))
            rest -= count
            parts -= 1
        return shares

    def _short_one_waits(self, size: int, order: int) -> bool:
        """One that has at most ``size`` positions to compute, and no lower priority than ``order``."""
        known_to_wait = KnownToWait(self.manager)
        return any((seq.lack or seq.num_tokens) <= size and seq.order[0] <= order and not known_to_wait(seq) for seq in self.waiting)

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
                work.new_blocks = self.manager.send(seq, work.first_block)

    def add_work(self, plan: StepPlan, seq: Sequence, start: int, count: int) -> None:
        """The step computes ``count`` positions of ``seq`` from ``start`` on; its table covers them."""
        first = seq.num_sent
        blocks = self.manager.send(seq, first) if len(seq.block_table) > first * self._width else []
        work = RowWork(seq.row, start, count, blocks, False, first)
        _ask(work, seq)
        if not seq.started:
            seq.started = True
            seq.unsent.clear()
            search = seq.group.search
            candidates = 0 if search is None else search.num_candidates + seq.num_banned
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

    # Rows.

    def run(self, seq: Sequence) -> None:
        """``seq``, which has its blocks, takes a row. There must be one."""
        seq.row = self._rows.pop()
        seq.started = False
        seq.status = Status.RUNNING
        if self.running and self.running[-1].order > seq.order:
            insort(self.running, seq, key=_order)
        else:
            self.running.append(seq)

    def preempt(self, i: int, cause: PreemptionCause, reason: str) -> None:
        """running[i] gives its row back, and waits at its place in the queue. Its blocks are freed, though still findable, or swapped
        out."""
        seq = self.running.pop(i)
        seq.lack = None
        positions = seq.num_computed
        self.manager.counters.preempted[cause] += 1
        seq.group.preemptions += 1
        self.manager.trim(seq)  # a draft's blocks, and those of a step that failed, hold nothing
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
        self.refused = None
        if seq is self.early:
            self.early = None
        self._rows.append(seq.row)
        seq.row = -1
