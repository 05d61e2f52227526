"""StepPlan and StepResult: the one value that goes to the device, and the one that comes back.

A running sequence has a *row* in the backend's tables: its tokens, its block table, its sampling parameters. A plan says
what changed since the last one, so a step costs in proportion to the number of running sequences, not to their lengths.
The backend appends a sampled token to its row itself; the next plan does not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.outputs import TokenLogprobs
from quire.sampling_params import SamplingParams

Pooling = Literal["mean", "last"]
"""How the hidden states of a prompt (those that lm_head reads) become one vector."""
NOTHING = range(0)


@dataclass(slots=True)
class RowStart:
    """A sequence takes a row (for the first time, again after a preemption, or as a fork). Overwrites all that the row held."""

    row: int
    tokens: list[int]
    """Every token known so far: prompt, then generated ones. The backend copies them."""
    num_prompt: int
    """The first ``num_prompt`` of ``tokens`` are the prompt (penalties treat output apart)."""
    params: SamplingParams
    seed: int
    """0 <= seed < 2**64. Draws are keyed by (seed, position), so a resumed row draws what it would have drawn."""
    stop_ids: tuple[int, ...]
    """End-of-text and stop token ids: banned while fewer than ``params.min_tokens`` tokens were generated."""
    num_candidates: int = 0
    """Above 0 the row is a beam: a step reports its ``num_candidates`` most likely tokens (``TokenLogprobs.top``) and appends
    none of them; the next plan brings the token that the search chose."""
    pooling: Pooling | None = None
    """Its scored positions (``RowWork.score``) make a vector, and not log-probabilities."""


@dataclass(slots=True)
class RowWork:
    """Compute the positions ``start <= p < start + count`` of a row: write their KV, attend, maybe sample."""

    row: int
    start: int
    count: int
    new_blocks: list[int]
    """Block ids that the row's block table holds from logical block ``first_block`` on, one for each group of layers; known before the
    step, they cover position ``start + count - 1``. Usually appended; the last logical block of a table is replaced when it was copied
    on write. -1 stands for a block that left the sliding window: nothing reads it."""
    sample: bool
    """Sample the token at position ``start + count`` from the logits of the last computed position."""
    first_block: int = 0
    tokens: Sequence[int] = ()
    """Tokens to append to the row before the step: those that the backend did not sample itself."""
    write: bool = True
    """False: the KV of the (one) position is in the blocks already, and is only read."""
    masks: Sequence[bytes | None] = ()
    """The tokens that may be sampled, a bit each: bit t % 8 of byte t // 8, a multiple of 4 bytes that covers the vocabulary. One for
    each token that is sampled, None where all are allowed; empty where that is so for the whole row."""
    draft: Sequence[int] = ()
    """Guessed tokens, at the last ``len(draft)`` of the ``count`` positions, behind the known ones. Where there are any, a token is
    sampled after the last known position and after each of them, as if those before it were right; see ``accepted``."""
    score: range = NOTHING
    """Positions of the prompt, among those that are computed, that are scored: the log-probability of the token that follows each,
    and the ``params.prompt_logprobs`` most likely ones; or what they add to the row's pooled vector. Each position of a row comes
    once, in order, from its RowStart to the next."""


@dataclass(slots=True)
class StepExtent:
    """What steps ask of a device, counted; ModelCost (models/spec.py) says what that costs. It adds up over steps."""

    steps: int = 0
    sampling_steps: int = 0
    """Those with a row of logits."""
    positions: int = 0
    """Positions computed."""
    keys: int = 0
    """Positions whose KV is read, once for each row."""
    context: int = 0
    """Keys that each position attends to, summed over positions."""
    rows: int = 0
    """Rows of logits."""
    rows_context: int = 0
    """Keys that these attend to."""
    near_keys: int = 0
    """``keys``, ``context`` and ``rows_context`` in layers with a window."""
    near_context: int = 0
    near_rows_context: int = 0

    def add(self, other: StepExtent) -> None:
        self.steps += other.steps
        self.sampling_steps += other.sampling_steps
        self.positions += other.positions
        self.keys += other.keys
        self.context += other.context
        self.rows += other.rows
        self.rows_context += other.rows_context
        self.near_keys += other.near_keys
        self.near_context += other.near_context
        self.near_rows_context += other.near_rows_context


@dataclass(slots=True)
class StepPlan:
    """One step. The backend applies ``starts``, then ``copies``, then computes ``work`` in order."""

    starts: list[RowStart] = field(default_factory=list)
    work: list[RowWork] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source block, destination block), done one after the other before any write of the step: a later copy may overwrite
    what an earlier one has read. Ids from ``num_blocks`` on are blocks of the swap pool in host memory."""

    @property
    def num_tokens(self) -> int:
        """Positions computed in this step."""
        return sum(w.count for w in self.work)

    def extent(self, window: int = 0) -> StepExtent:
        """What the step asks of a device. window: of the layers that have one; 0: none has."""
        positions = keys = context = rows = rows_context = 0
        near_keys = near_context = near_rows_context = 0
        for work in self.work:  # for each row in each step: no function is called for one that decodes
            end, count = work.start + work.count, work.count
            positions += count
            keys += end
            context += end if count == 1 else attended(end, count)
            if work.sample:
                sampled = 1 + len(work.draft)
                rows += sampled
                rows_context += end if sampled == 1 else attended(end, sampled)
            if work.score:
                rows += len(work.score)
                rows_context += attended(work.score.stop, len(work.score))
            if window:
                near_keys += min(end, window + count - 1)
                near_context += attended(end, count, window)
                if work.sample:
                    near_rows_context += attended(end, 1 + len(work.draft), window)
                if work.score:
                    near_rows_context += attended(work.score.stop, len(work.score), window)
        if not window:
            near_keys, near_context, near_rows_context = keys, context, rows_context
        return StepExtent(
            1, rows > 0, positions, keys, context, rows, rows_context, near_keys, near_context, near_rows_context
        )  # fmt: skip


def attended(end: int, count: int, window: int = 0) -> int:
    """Keys that the ``count`` positions before position ``end`` attend to: position p to p + 1, or to ``window`` where that is less."""
    if window and end > window:
        beyond = min(count, end - window)
        return beyond * window + attended(end - beyond, count - beyond)
    return count * (2 * end - count + 1) // 2


@dataclass(slots=True)
class StepResult:
    """What the device gives back: an entry for each RowWork with ``sample`` set, and one more for each token of its draft, in the
    plan's order."""

    tokens: list[int] = field(default_factory=list)
    """Sampled token ids; -1 where the row failed."""
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """None where the row's parameters ask for none."""
    errors: dict[int, str] = field(default_factory=dict)
    """Row → what went wrong (non-finite logits). Only that row's request ends, where the first of its tokens is -1 or it was scored."""
    scores: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """Row → an entry for each position of its ``score``."""
    vectors: dict[int, list[float]] = field(default_factory=dict)
    """Row → its pooled vector (of float32), where ``score`` reached the end of the prompt."""
    sample_s: float = 0.0
    """Seconds of the step that went from logits to tokens; 0 where the backend does not know."""


def accepted(draft: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of a row's ``sampled`` tokens, one more than ``draft`` has, are real: the first, and those behind it as long as the
    one before is what the draft says. A failure behind the first is left to the step that comes to it again."""
    count = 1
    while count <= len(draft) and sampled[count - 1] == draft[count - 1] and sampled[count] >= 0:
        count += 1
    return count
