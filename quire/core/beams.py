"""The sequences of a beam search: how they fork, end and report, by the moves of BeamSearch.

A search begins as one sequence that computes the prompt; its first candidates make it fork. From then on each beam is a
sequence like any other, that runs, waits or is preempted by itself; the search goes on when all of its beams have their
candidates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from quire.core.sequence import Group, Sequence, Status
from quire.outputs import SequenceOutput, TokenLogprobs

if TYPE_CHECKING:
    from quire.core.scheduler import Scheduler


def fail(scheduler: Scheduler, seq: Sequence, message: str) -> list[SequenceOutput]:
    """One row failed: its sequence ends, and with a beam its whole search."""
    request, group = seq.request, seq.group
    indices: Iterable[int] = [seq.index] if group.search is None else range(request.params.n)
    for gone in [seq] if group.search is None else list(group.sequences):
        if gone.status is not Status.FINISHED:
            scheduler.remove(gone)
    if group.search is not None:
        group.search = None
    return [SequenceOutput(request.request_id, index, [], None, "error", message) for index in indices]


def advance(scheduler: Scheduler, group: Group) -> list[SequenceOutput]:
    """All beams of a search have their candidates: it decides which go on. They fork; those that end free their blocks."""
    assert group.search is not None
    beams = list(group.sequences)
    moves = group.search.advance([_candidates(beam) for beam in beams])
    for beam in beams:
        beam.candidates = None
    if not moves:
        for beam in beams:
            scheduler.policy.ended(beam.num_generated, False)
            scheduler.remove(beam)
        return _hypotheses(group)
    goes_on = {move.parent for move in moves}
    for i, beam in enumerate(beams):
        if i not in goes_on:
            scheduler.remove(beam)
    group.sequences.clear()
    taken: set[int] = set()
    kept = {beams[i].index for i in goes_on}
    free = iter([index for index in range(len(moves)) if index not in kept])
    for move in moves:
        parent = beams[move.parent]
        if move.parent in taken:
            group.sequences.append(_fork(scheduler, parent, next(free), move.token))
        else:
            taken.add(move.parent)
            group.sequences.append(parent)
    for beam, move in zip(group.sequences, moves, strict=True):
        if beam is beams[move.parent]:  # after its forks: they begin with the tokens before this one
            beam.tokens.append(move.token)
            beam.unsent.append(move.token)
    return []


def _candidates(beam: Sequence) -> list[tuple[int, float]]:
    """A beam's candidates, without those that would end it before min_tokens."""
    candidates = beam.candidates or []
    if beam.num_generated < beam.request.params.min_tokens:
        return [candidate for candidate in candidates if candidate[0] not in beam.stop_ids]
    return candidates


def _fork(scheduler: Scheduler, parent: Sequence, index: int, token: int) -> Sequence:
    """A new beam: ``parent``'s tokens and blocks, and one more token."""
    child = replace(
        parent, index=index, tokens=[*parent.tokens, token], order=(*parent.order[:2], index), row=-1, status=Status.WAITING, unsent=[],
        num_computed=0, block_table=[], num_sent=0, num_trimmed=0, num_borrowed=0, shared_tail=False, node=None, num_published=0,
        host_blocks=None, num_swapped=0, num_lost=0, started=False,
    )  # fmt: skip
    if parent.status is Status.RUNNING and scheduler.num_free_rows:
        scheduler.manager.fork(parent, child, parent.num_computed)
        scheduler.run(child)
    else:  # without a row, or without blocks to share, it waits as if it had been preempted
        scheduler.add(child)
    return child


def _hypotheses(group: Group) -> list[SequenceOutput]:
    request, search = group.request, group.search
    assert search is not None
    found = search.hypotheses()
    outputs = []
    for index in range(request.params.n):
        if index >= len(found):
            message = f"the model allows only {len(found)} different continuations, fewer than n={request.params.n}"
            outputs.append(SequenceOutput(request.request_id, index, [], None, "error", message))
            continue
        best = found[index]
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = [TokenLogprobs((value, 0), []) for value in best.logprobs]
        output = SequenceOutput(request.request_id, index, best.token_ids, logprobs, best.finish_reason, best.stop_reason)
        output.cached_tokens, output.queued_s, output.preemptions = group.cached_tokens, group.queued_s, group.preemptions
        outputs.append(output)
    return outputs
