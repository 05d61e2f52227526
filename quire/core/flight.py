"""A step between its plan and its result: what a sequence is told when the step is launched, and what when it is read.

    plan
    launch    its positions count as computed, whole blocks of known tokens are published, a token is in flight
      .       where steps overlap, the next one is planned and launched here, while the device computes; else there is nothing between
    commit    the token is known: it is put out, and may end its sequence

A device runs steps in the order of their launches. So a plan may count on what the steps before it compute, whether that has happened
yet or not, and may hand out blocks and rows that they still use. It does without their tokens: a sequence whose newest token is in
flight computes the position of that token, which its row on the device has. See ``Sequence.waits`` and ``Sequence.ends`` for those
that can't.

A sequence that ends while a later step of it is in flight is gone at once; what that step brings for it is thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core import beams
from quire.core.constraint import follow
from quire.core.plan import RowWork, StepPlan, StepResult
from quire.core.sequence import Group, Sequence, Status
from quire.core.stats import StepCounters
from quire.errors import QuireError
from quire.outputs import SequenceOutput, TokenLogprobs

if TYPE_CHECKING:
    from quire.core.block_manager import BlockManager
    from quire.core.scheduler import Scheduler

MOST_WAITING = 4
"""Where more than one in so many running sequences needs what is in flight for its next step, no step is planned before that is read:
without them it would cost nearly as much as with them, and they would run in every other step only."""


@dataclass(slots=True, eq=False)
class Flight:
    """A step that was planned and not read."""

    plan: StepPlan
    sequences: list[Sequence]
    """Those of the plan's work."""
    launched: bool = False


def should_read(running: list[Sequence]) -> bool:
    """Too many of the running sequences can't go on before the step in flight is read."""
    return sum(seq.waits for seq in running) * MOST_WAITING > len(running)


def launch(scheduler: Scheduler, flight: Flight) -> None:
    """The step is on its way: what is known without its result."""
    flight.launched = True
    for work, seq in zip(flight.plan.work, flight.sequences, strict=True):
        _launch(scheduler.manager, work, seq)


def commit(scheduler: Scheduler, flight: Flight, result: StepResult) -> list[SequenceOutput]:
    """The step's result is there: sequences grow, and those that are finished are freed. Outputs in the plan's order.

    What ``launch`` has not done is done here, for one sequence after the other.
    """
    outputs: list[SequenceOutput] = []
    searches: list[Group] = []
    counters, manager, launched = scheduler.counters, scheduler.manager, flight.launched
    tokens, errors = iter(result.tokens), result.errors
    logprobs = iter(result.logprobs)
    counters.tokens_sampled += len(result.tokens)  # those that do not count are taken off
    for work, seq in zip(flight.plan.work, flight.sequences, strict=True):
        if seq.status is Status.FINISHED:  # since the launch; or another row of its search failed
            _discard(work, tokens, logprobs, counters)
            continue
        if not launched:
            _launch(manager, work, seq)
        if work.score:
            if seq.scores is not None:
                seq.scores += result.scores.get(work.row, ())
            seq.vector = result.vectors.get(work.row)
        if not work.sample:
            if work.score and work.row in errors:
                outputs += beams.fail(scheduler, seq, errors[work.row])
            elif seq.max_tokens == 0 and work.start + work.count == len(seq.tokens):  # all that was wanted is the prompt
                output = _first(seq, SequenceOutput(seq.request.request_id, seq.index, [], None, "length"))
                output.preemptions = seq.group.preemptions
                outputs.append(output)
                scheduler.remove(seq)
            continue
        token, entry = next(tokens), next(logprobs)
        seq.in_flight -= 1
        drafted: list[tuple[int, TokenLogprobs | None]] = []
        if work.draft:
            drafted = [(next(tokens), next(logprobs)) for _ in work.draft]
            seq.in_flight -= len(drafted)
        if token < 0 or (work.score and work.row in errors):
            outputs += beams.fail(scheduler, seq, errors[work.row])
            continue
        if seq.group.search is not None:
            assert entry is not None, "a beam's row reports its candidates"
            seq.candidates = entry.top
            searches.append(seq.group)
            continue
        seq.tokens.append(token)
        if seq.num_computed >= seq.publish_at:  # a later step computes the token's position, and with it a whole block
            manager.advance(seq)
        output = SequenceOutput(seq.request.request_id, seq.index, [token], None if entry is None else [entry])
        if seq.first_output:
            _first(seq, output)
        end = seq.end_reason()
        if drafted and scheduler.speculation is not None:
            end = scheduler.speculation.verify(work, seq, output, drafted, counters)
        if seq.constraint is not None:
            try:
                end = follow(seq, output)
            except QuireError as e:
                outputs += beams.fail(scheduler, seq, e.message)
                continue
        if end is not None:
            output.finish_reason, output.stop_reason = end
            output.preemptions = seq.group.preemptions
            scheduler.policy.ended(seq.num_generated, end[0] == "stop")
            _leave_prompt(scheduler, seq)
            scheduler.remove(seq)
        outputs.append(output)
    for group in searches:
        if group.sequences and all(beam.candidates is not None for beam in group.sequences):
            outputs += beams.advance(scheduler, group)
    return outputs


def brings(work: RowWork, seq: Sequence) -> int:
    """What the step adds to ``seq.in_flight`` while it is in flight."""
    if work.sample:
        return 1 + len(work.draft)
    return int(seq.max_tokens == 0 and work.start + work.count == len(seq.tokens))


def _launch(manager: BlockManager, work: RowWork, seq: Sequence) -> None:
    seq.num_computed = computed = work.start + work.count - len(work.draft)
    if computed >= seq.publish_at:
        manager.advance(seq)
    if work.score:
        seq.unscored = range(work.score.stop, seq.unscored.stop)
    seq.in_flight += brings(work, seq)


def _leave_prompt(scheduler: Scheduler, seq: Sequence) -> None:
    """One of several samples ends before others could share its prompt: one of them takes that over, where no cache keeps it and there
    is a row."""
    manager, siblings = scheduler.manager, seq.group.sequences
    if manager.caching or seq.num_generated > 1 or len(siblings) == 1 or not scheduler.num_free_rows:
        return
    if not manager.can_fork(seq, seq.num_prompt) or any(other.status is Status.RUNNING for other in siblings if other is not seq):
        return
    heir = next((other for other in siblings if other.status is Status.WAITING and other.num_tokens == other.num_prompt), None)
    if heir is not None and not heir.unscored:
        scheduler.waiting.remove(heir)
        manager.fork(seq, heir, seq.num_prompt)
        scheduler.run(heir)


def _first(seq: Sequence, output: SequenceOutput) -> SequenceOutput:
    """``output``, with what the first one of ``seq`` says of the request."""
    seq.first_output = False
    output.cached_tokens, output.queued_s = seq.group.cached_tokens, seq.group.queued_s
    output.prompt_logprobs, seq.scores = seq.scores, None
    output.vector = seq.vector
    return output


def _discard(work: RowWork, tokens: Iterator[int], logprobs: Iterator[TokenLogprobs | None], counters: StepCounters) -> None:
    """Pass over what the step brings for a sequence that has ended."""
    count = 1 + len(work.draft) if work.sample else 0
    for _ in range(count):
        next(tokens), next(logprobs)
    counters.positions_discarded += work.count
    counters.tokens_sampled -= count
