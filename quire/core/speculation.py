"""Speculation: guess tokens, compute them in the same step as the known one, keep those that the model would have said itself.

    known     [ ............... t ]
    draft                          [ g1 g2 g3 ]
    the step  computes t g1 g2 g3, and samples after each of them:  s1 s2 s3 s4
    new       g1 if s1 = g1, then g2 if s2 = g2, ... and the first s that differs, or the one after the last

A token is sampled from logits that do not depend on what else is computed, by draws keyed to its position: s1 is what a step
without a draft gives, and so is each one after it while its predecessors are right. Nothing but speed depends on a guess.

Reading the weights is most of a step's cost while it has few positions, and then a few more cost little. So a step is filled
up with guesses to about as many positions as the device computes for the price of reading; steps that have as many anyway get
none. What a step with guesses takes more than one without is learned while they run, and guesses have to promise more tokens than
that. Guesses come last: from what prompts and admission leave of the budget, and into blocks that are free. Those that were
wrong leave no trace.
"""

from __future__ import annotations

from bisect import bisect_right

from quire.core.block_manager import BlockManager
from quire.core.plan import RowWork, StepPlan, accepted
from quire.core.prompt_lookup import PAIR, PromptLookup
from quire.core.sequence import Sequence, Status
from quire.core.stats import StepCounters
from quire.outputs import SequenceOutput, TokenLogprobs

MAX_POSITIONS = 8
"""Positions up to which a step is filled up. With float32 weights on two AVX-512 cores, 8 cost 1.1 to 1.25 of one, and twice as
many twice as much (llama-160m); a model that fits into the caches is at 2.5."""
MATCHES = (PAIR, PAIR + 2, PAIR + 6)
"""Tokens in common from which on matches are of a kind, each with a rate of its own: a table's column names are found again after
few tokens in common, and its numbers are not after many."""
FIRST_RATES = (0.4, 0.6, 0.85)
WEIGHT = 0.2
"""Of one guess in the rate of those that came true."""
BEST_CHANCE = 0.97
LEAST_CHANCE = 0.4
"""Of a guess that is worth its place in a step of one position. It costs 0.03 to 0.1 of the step where the step reads weights from
memory, up to 0.3 in a small model that fits into the caches."""
POSITION_COST = 0.08
"""Of a guessed position, in steps without drafts; what else a step with drafts takes is learned."""
MOST_COST = 2.0
COST_WEIGHT = 0.3
"""Of the last step with drafts in what they are taken to cost."""
PLAIN_WEIGHT = 0.1
"""Of the last step without drafts in how long such steps take."""
FORGET = 0.999
"""Of the cost, for each time that it was too much: it is learned again by and by, should it have been learned at a bad moment."""
IDLE, MAX_IDLE = 8, 7
"""For each IDLE looks in a row that came to nothing, one more token passes by before the next, at most MAX_IDLE: looking costs
microseconds, which a small model's step notices."""
MAX_PATIENCE = 6
"""After f failures in a row the next draft waits for 2**f tokens, at most for 2**MAX_PATIENCE."""


def worth(positions: int) -> float:
    """How likely the last token of a draft has to be right, in a step of ``positions`` positions without drafts: a guess that comes
    true adds one token to as many, and one that does not costs about as much more of the step's time as there are more."""
    return LEAST_CHANCE + 0.1 * (positions - 1)


class Drafter:
    """Guesses for one sequence, from what followed the same tokens earlier; learns what its guesses are worth.

    The chance of a guess is the rate at which guesses have come true lately after matches of its kind. A draft goes on as long as
    all of it is likely enough; after drafts of which nothing was right there is none for a while.
    """

    __slots__ = ("_chance", "_failures", "_idle", "_kind", "_lookup", "_rates", "_start", "_tokens", "look_at")

    def __init__(self, tokens: list[int]) -> None:
        """tokens: the sequence's own, which grow."""
        self.look_at = 0
        """There is no use in looking while there are fewer tokens."""
        self._tokens = tokens
        self._lookup = PromptLookup(tokens)
        self._rates = list(FIRST_RATES)
        self._kind = 0
        self._failures = 0
        self._idle = 0
        self._start = 0
        self._chance = 0.0

    def look(self) -> bool:
        """Whether there is something to guess from, and a guess can be worth it."""
        self._start, common = self._lookup.find()
        self._kind = max(0, bisect_right(MATCHES, common) - 1)
        self._chance = min(BEST_CHANCE, self._rates[self._kind]) if common else 0.0
        if self._chance >= LEAST_CHANCE:
            return True
        self.skip()
        return False

    def skip(self) -> None:
        """The look came to nothing."""
        self._idle += 1
        self.look_at = len(self._tokens) + 1 + min(self._idle // IDLE, MAX_IDLE)

    def draft(self, most: int, least_chance: float) -> list[int]:
        """The next tokens, at most ``most``, all of them right with a probability of ``least_chance`` or more. After ``look``."""
        count, all_right = 0, self._chance
        while count < most and all_right >= least_chance:
            count += 1
            all_right *= self._chance
        return self._lookup.draft(self._start, count)

    def expected(self, count: int) -> float:
        """How many of ``count`` guesses are right, on average. After ``look``."""
        return sum(self._chance**i for i in range(1, count + 1))

    def learn(self, drafted: int, right: int) -> None:
        """Of the last ``drafted`` tokens the first ``right`` were right; the tokens are known by now."""
        for i in range(min(right + 1, drafted)):
            self._rates[self._kind] += WEIGHT * ((i < right) - self._rates[self._kind])
        if right:
            self._failures = self._idle = 0
        else:
            self._failures = min(self._failures + 1, MAX_PATIENCE)
            self.look_at = len(self._tokens) + (1 << self._failures) - 1


class DraftCost:
    """What steps take more with drafts than without, in steps without: positions, and what the backend saves itself in steps that are all
    alike. Learned from steps of the same rows."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}
        """Seconds of steps without drafts, by their rows."""
        self._fixed = 0.0

    def learn(self, rows: int, drafted: int, seconds: float) -> None:
        """Of a step that computed one position of each of ``rows``, and ``drafted`` guesses."""
        plain = self._plain.get(rows, seconds)
        if drafted == 0:
            self._plain[rows] = plain + PLAIN_WEIGHT * (min(seconds, 2 * plain) - plain)
        elif plain > 0 and rows in self._plain:
            fixed = min(seconds / plain - 1, MOST_COST) - POSITION_COST * drafted
            self._fixed += COST_WEIGHT * (max(fixed, 0.0) - self._fixed)

    def pays(self, rows: int, drafted: int, expected: float) -> bool:
        """Whether ``expected`` tokens are more than come in the time that ``drafted`` guesses take, in a step of ``rows``."""
        if expected > (self._fixed + POSITION_COST * drafted) * rows:
            return True
        self._fixed *= FORGET
        return False


class Speculation:
    """Adds drafts to plans, and takes note of what becomes of them.

    strict: draft only while everybody's longest output fits into the pool. What a policy counts on that never evicts is that
    all sequences grow alike; drafts make some of them faster.
    """

    def __init__(self, manager: BlockManager, max_positions: int, *, strict: bool = False) -> None:
        """max_positions: of a step with drafts; no more than a step may have anyway."""
        self._manager = manager
        self._max_positions = max_positions
        self._strict = strict
        self._cost = DraftCost()
        self._rest = 0
        """Steps of ``_rows`` rows in which there is nothing to look up: a step's way past all sequences costs microseconds, too."""
        self._rows = 0
        self._step: tuple[int, int] | None = None
        """(rows, guesses) of the last plan, where it is to be timed."""

    def timed(self, seconds: float) -> None:
        """What the last plan took to be computed."""
        if self._step is not None:
            self._cost.learn(*self._step, seconds)

    def extend(self, plan: StepPlan, planned: list[Sequence], running: list[Sequence], budget: int) -> None:
        """Add drafts to ``plan``, whose work is that of the sequences ``planned``. Nobody is preempted for them."""
        self._step = None
        most = min(self._max_positions, budget)
        if len(planned) >= most:
            return
        if self._rest > 0 and len(planned) == self._rows:
            self._rest -= 1
            return
        positions, rest = plan.num_tokens, MAX_IDLE
        found: list[tuple[RowWork, Sequence, Drafter]] = []
        if positions == len(planned):
            self._step = positions, 0
        for work, seq in zip(plan.work, planned, strict=True):
            if _may_draft(work, seq):
                drafter = seq.drafter
                if drafter is None:
                    drafter = seq.drafter = Drafter(seq.tokens)
                if len(seq.tokens) >= drafter.look_at and drafter.look():
                    found.append((work, seq, drafter))
                rest = min(rest, drafter.look_at - len(seq.tokens) - 1)
            else:
                rest = 0
        self._rest, self._rows = rest, len(planned)
        if not found or (self._strict and not self._all_fit(running)):
            return
        room, least_chance = most - positions, worth(positions)
        drafts = []
        for i, (work, seq, drafter) in enumerate(found):
            share = -(-room // (len(found) - i))
            if draft := drafter.draft(min(share, seq.max_tokens - seq.num_generated - 1), least_chance):
                drafts.append((work, seq, drafter, draft))
                room -= len(draft)
        if not drafts:
            return
        guessed = sum(len(draft) for *_, draft in drafts)
        expected = sum(drafter.expected(len(draft)) for *_, drafter, draft in drafts)
        if not self._cost.pays(positions, guessed, expected):
            for _, _, drafter, _ in drafts:
                drafter.skip()
            return
        for work, seq, _, draft in drafts:
            masks: list[bytes | None] = []
            if seq.constraint is not None:
                masks = seq.constraint.foresee(draft)
                draft = draft[: len(masks) - 1]
            if draft and self._make_room(work, seq, len(draft), len(running)):
                work.draft, work.masks = draft, masks
                work.count += len(draft)
                if self._step is not None:
                    self._step = positions, self._step[1] + len(draft)

    def verify(
        self, work: RowWork, seq: Sequence, output: SequenceOutput, sampled: list[tuple[int, TokenLogprobs | None]], counters: StepCounters
    ) -> tuple[str, int | None] | None:
        """``seq`` and ``output`` have the token after the last known one, and get what counts of those that were ``sampled`` after
        each token of the draft, up to where the sequence ends. Returns its end_reason()."""
        draft = work.draft
        right = accepted(draft, [seq.tokens[-1], *(token for token, _ in sampled)]) - 1
        end = seq.end_reason()
        here = seq.status is Status.RUNNING  # else it was preempted meanwhile, and has lost what the step computed
        for token, entry in sampled[:right]:
            if end is not None:
                break
            seq.tokens.append(token)
            if here:
                seq.num_computed += 1
            output.token_ids.append(token)
            if output.logprobs is not None and entry is not None:
                output.logprobs.append(entry)
            end = seq.end_reason()
        taken = len(output.token_ids) - 1
        counters.tokens_drafted += len(draft)
        counters.tokens_accepted += taken
        counters.tokens_sampled -= len(draft) - taken
        if seq.drafter is not None:
            seq.drafter.learn(len(draft), taken)
        if seq.num_computed >= seq.publish_at:
            self._manager.advance(seq)
        self._manager.trim(seq)
        return end

    def _make_room(self, work: RowWork, seq: Sequence, count: int, reserve: int) -> bool:
        """Blocks for ``count`` more positions, if ``reserve`` blocks stay free. One that is evicted for a draft would have gone a few
        tokens later; it comes back at the end of the step if the draft was wrong, and is the next to be taken."""
        manager = self._manager
        end = work.start + work.count + count
        missing = manager.missing(seq, end)
        if missing > 0 and missing + reserve > manager.pool.num_free:
            return False
        if not manager.grow(seq, end):
            return False
        work.new_blocks = manager.send(seq, work.first_block)
        return True

    def _all_fit(self, running: list[Sequence]) -> bool:
        """The blocks that all of ``running`` may still come to need are free."""
        manager = self._manager
        need = sum(manager.needs.rest(seq, seq.num_prompt + seq.max_tokens) for seq in running)
        return need <= manager.pool.num_free


def _may_draft(work: RowWork, seq: Sequence) -> bool:
    """One position, to be written and sampled, of a sequence that has begun to generate, whose tokens are all known, and whose last
    block is its own (a copy would come too late in this step). Beams choose their tokens elsewhere."""
    return (
        work.count == 1 and work.sample and work.write and not seq.shared_tail and seq.group.search is None
        and seq.num_generated > 0 and not seq.in_flight
    )  # fmt: skip
