"""Scheduler: decides what runs in a step, who is admitted, who is preempted.

A step has a budget of token positions. Running sequences come first, oldest first: each computes what it lacks, up to
the budget (one position while it decodes, a chunk while its prompt is long). What is left of the budget admits waiting
sequences in order of arrival. So prompts are chunked and mixed with decodes by the budget alone.

A running sequence that can't get a block preempts the youngest running one (maybe itself): its blocks are freed, it waits
at the head of the queue, and computes everything again when there is room. The oldest sequence is never preempted by a
younger one, and alone it always fits (the engine refuses a pool that can't hold one sequence of the longest length), so
every sequence ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from quire.core.block_manager import BlockManager
from quire.core.plan import RowStart, RowWork, StepPlan, StepResult
from quire.core.sequence import Sequence, Status
from quire.outputs import SequenceOutput


@dataclass(slots=True)
class SchedulerCounters:
    """Running totals since the start."""

    tokens_computed: int = 0
    tokens_sampled: int = 0
    preemptions: int = 0
    tokens_recomputed: int = 0


class Scheduler:
    """Plans steps over ``max_num_seqs`` rows and ``max_num_batched_tokens`` positions a step."""

    def __init__(self, manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.manager = manager
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival; a preempted sequence that comes back takes its old place."""
        self.counters = SchedulerCounters()
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        # A few free blocks are left at admission so that running sequences can grow without preempting at once.
        self._watermark = manager.pool.num_blocks // 100

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._vacate(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED

    def schedule(self) -> StepPlan:
        """The next step. Empty (no work) only where nothing is waiting or running."""
        plan = StepPlan()
        budget = self.max_num_batched_tokens
        before = self.counters.preemptions
        i = 0
        while i < len(self.running) and budget > 0:
            seq = self.running[i]
            count = min(seq.num_tokens - seq.num_computed, budget)
            blocks = self._grow(seq, count)
            if blocks is None:  # seq itself was the youngest, and was preempted
                break
            self._plan(plan, seq, count, blocks)
            budget -= count
            i += 1
        if self.counters.preemptions == before:
            self._admit(plan, budget)
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Advance the planned sequences by the step's result; finished ones are freed. Outputs in the plan's order."""
        by_row = {seq.row: seq for seq in self.running}
        outputs = []
        sampled = 0
        for work in plan.work:
            seq = by_row[work.row]
            seq.num_computed += work.count
            self.counters.tokens_computed += work.count
            if not work.sample:
                continue
            token, logprobs = result.tokens[sampled], result.logprobs[sampled]
            sampled += 1
            request = seq.request
            if work.row in result.errors:
                self.remove(seq)
                outputs.append(SequenceOutput(request.request_id, seq.index, [], None, "error", result.errors[work.row]))
                continue
            seq.tokens.append(token)
            self.counters.tokens_sampled += 1
            output = SequenceOutput(request.request_id, seq.index, [token], None if logprobs is None else [logprobs])
            if (end := seq.end_reason()) is not None:
                output.finish_reason, output.stop_reason = end
                self.remove(seq)
            outputs.append(output)
        return outputs

    def _grow(self, seq: Sequence, count: int) -> list[int] | None:
        """Blocks for the next ``count`` positions, preempting younger sequences; None where seq itself had to go.

        Victims come from the end of ``running``, behind ``seq``, so none of them is in the plan yet.
        """
        while (blocks := self.manager.grow(seq, seq.num_computed + count)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return None
        return blocks

    def _preempt(self, seq: Sequence) -> None:
        assert self.running[-1] is seq
        self.running.pop()
        self.counters.preemptions += 1
        self.counters.tokens_recomputed += seq.num_computed
        self._vacate(seq)
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)

    def _vacate(self, seq: Sequence) -> None:
        self.manager.free(seq)
        self._rows.append(seq.row)
        seq.row = -1

    def _admit(self, plan: StepPlan, budget: int) -> None:
        if not self.waiting:
            return
        # All that a sequence has to compute must fit beside what the running ones still have to (the rest of a chunked
        # prompt), though it is allocated chunk by chunk.
        room = self.manager.pool.num_free - sum(self.manager.blocks_for(s.num_tokens) - len(s.block_table) for s in self.running)
        while self.waiting and self._rows and budget > 0:
            seq = self.waiting[0]
            need = self.manager.blocks_for(seq.num_tokens)
            if need + (self._watermark if self.running else 0) > room:
                return
            room -= need
            count = min(seq.num_tokens, budget)
            blocks = self.manager.grow(seq, count)
            assert blocks is not None
            self.waiting.popleft()
            seq.row = self._rows.pop()
            seq.status = Status.RUNNING
            self.running.append(seq)
            plan.starts.append(RowStart(seq.row, seq.tokens, seq.num_prompt, seq.request.params, seq.seed, seq.stop_ids))
            self._plan(plan, seq, count, blocks)
            budget -= count

    def _plan(self, plan: StepPlan, seq: Sequence, count: int, blocks: list[int]) -> None:
        sample = seq.num_computed + count == seq.num_tokens
        plan.work.append(RowWork(seq.row, seq.num_computed, count, blocks, sample))
