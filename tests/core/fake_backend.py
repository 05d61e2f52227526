"""A backend without a model: it replays plans into rows and checks that they make sense."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from quire.core.groups import KVGroups
from quire.core.plan import RowStart, RowWork, StepPlan, StepResult, accepted
from quire.core.speculation import Drafter
from quire.outputs import TokenLogprobs


@dataclass
class Vocab:
    vocab_size: int = 50


@dataclass
class Row:
    tokens: list[int]
    start: RowStart
    blocks: list[int] = field(default_factory=list)
    next_score: int | None = None
    """Where the next scores begin, if there were any since the row was started."""


class FakeBackend:
    """Writes (row token, position) into a pool by the plan, as a real backend writes KV, and reads it back.

    What it writes for a position stands for the KV of a real model: it depends on every token up to there. The sampled token
    is a hash of it, so a wrong block table, a block with two writers, a wrong prefix or a skipped position changes the output.
    A window hides what is before it from every query in the windowed groups: all there is, or ``groups`` of (full, windowed).
    ``fails``: one in so many tokens can't be sampled, and it depends on those before it which.
    """

    overlaps = False

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 32,
        vocab_size: int = 50,
        *,
        num_host_blocks: int = 0,
        window: int = 0,
        groups: tuple[int, int] = (0, 1),
        fails: int = 0,
    ) -> None:
        self.spec = Vocab(vocab_size)
        self.num_blocks, self.block_size, self.max_model_len = num_blocks, block_size, max_model_len
        self.num_host_blocks, self.fails = num_host_blocks, fails
        self.groups = KVGroups(*groups, window) if window else KVGroups()
        self.pool: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks + num_host_blocks)]
        self.rows: dict[int, Row] = {}
        self.fail_rows: set[int] = set()
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for start in plan.starts:
            self.rows[start.row] = Row(list(start.tokens), start)
        for source, destination in plan.copies:
            self.pool[destination] = list(self.pool[source])
        written: set[tuple[int, int]] = set()
        for work in plan.work:
            row = self.rows[work.row]
            assert work.count > 0
            row.tokens += work.tokens
            assert len(work.new_blocks) % self.groups.width == 0
            row.blocks[work.first_block * self.groups.width :] = work.new_blocks
            assert work.sample or not work.draft
            known = [*row.tokens, *work.draft]
            assert work.start + work.count <= len(known), "a token is computed that the row does not have"
            prints = fingerprints(known)
            assert all(0 <= block < self.num_blocks or block == -1 for block in row.blocks), "a table holds a block of the swap pool"
            assert work.write or work.count == 1
            for position in range(work.start, work.start + work.count):
                for group in range(self.groups.width if work.write else 0):
                    place = self._place(row, position, group)
                    assert place[0] >= 0, "a block that left the window is written"
                    assert place not in written, "a position of a block is written twice in one step"
                    written.add(place)
                    self.pool[place[0]][place[1]] = prints[position] + group
        result = StepResult()
        for work in plan.work:  # read after every write of the step, so that a shared block shows
            row = self.rows[work.row]
            self._look(row, [*row.tokens, *work.draft], work.start, work.start + work.count)
            if work.sample:
                assert work.start + work.count == len(row.tokens) + len(work.draft)
                self._sample(row, work.row, work.draft, work.masks, result)
            if work.score:
                self._score(row, work, result)
        return result

    def _score(self, row: Row, work: RowWork, result: StepResult) -> None:
        """Positions come once each, in order; see ``expected_scores`` and ``expected_vector``."""
        score = work.score
        assert work.start <= score.start < score.stop <= work.start + work.count
        first = row.start.num_prompt - 1 if row.start.pooling == "last" else 0
        assert score.start == (first if row.next_score is None and row.start.pooling else row.next_score or score.start)
        row.next_score = score.stop
        prompt = row.tokens[: row.start.num_prompt]
        if work.row in self.fail_rows:
            result.errors[work.row] = "logits are not finite"
        elif row.start.pooling is None:
            result.scores[work.row] = expected_scores(prompt)[score.start : score.stop]
        elif score.stop == len(prompt):
            result.vectors[work.row] = expected_vector(prompt)

    def _look(self, row: Row, tokens: list[int], start: int, end: int) -> None:
        """What the queries at positions ``start`` to ``end`` see is what it should be."""
        prints, groups = fingerprints(tokens), self.groups
        for group in range(groups.width):
            for position in range(max(0, start + 1 - groups.window) if group >= groups.full else 0, end):
                block, at = self._place(row, position, group)
                assert block >= 0, "a block was given back before it left the window"
                assert self.pool[block][at] == prints[position] + group, "the row's blocks hold something else than its tokens"

    def _place(self, row: Row, position: int, group: int) -> tuple[int, int]:
        """(block, position in it)"""
        return row.blocks[position // self.block_size * self.groups.width + group], position % self.block_size

    def _sample(self, row: Row, number: int, draft: Sequence[int], masks: Sequence[bytes | None], result: StepResult) -> None:
        if number in self.fail_rows or self._fails(row.tokens):
            result.tokens += [-1] * (1 + len(draft))
            result.logprobs += [None] * (1 + len(draft))
            result.errors[number] = "logits are not finite"
            row.tokens.append(0)  # its next step may be on the way, and be thrown away
            return
        if row.start.num_candidates:
            result.tokens.append(0)
            result.logprobs.append(TokenLogprobs((0.0, 1), candidates(row.tokens, row.start.num_candidates, self.spec.vocab_size)))
            return
        seen = [[*row.tokens, *draft[:i]] for i in range(1 + len(draft))]
        tokens = [expected_token(before, row.start.seed, self.spec.vocab_size) for before in seen]
        if masks:
            assert len(masks) == len(tokens)
            tokens = [allowed_token(token, mask, self.spec.vocab_size) for token, mask in zip(tokens, masks, strict=True)]
        tokens = [-1 if self._fails(before) else token for before, token in zip(seen, tokens, strict=True)]
        row.tokens += tokens[: accepted(draft, tokens)]
        result.tokens += tokens
        result.logprobs += [TokenLogprobs((-1.0, 1), []) if row.start.params.logprobs is not None else None for _ in tokens]

    def _fails(self, tokens: list[int]) -> bool:
        return self.fails > 0 and fingerprint(tokens) % self.fails == 0


class LateBackend(FakeBackend):
    """A fake device beside the host: a step's results are known when they are collected, and not before."""

    overlaps = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def execute(self, plan: StepPlan) -> StepResult:
        raise AssertionError("steps are launched here")

    def launch(self, plan: StepPlan) -> StepPlan:
        assert len(self.in_flight) < 2
        self.in_flight.append((plan, super().execute(plan)))
        return plan

    def collect(self, pending: StepPlan) -> StepResult:
        plan, result = self.in_flight.popleft()
        assert plan is pending, "steps are collected in the order in which they were launched"
        return result


class ScriptedDrafter(Drafter):
    """Knows what FakeBackend will say, and goes wrong when ``rng`` says so: after any number of right guesses, or never."""

    def __init__(self, tokens: list[int], seed: int, rng: random.Random, vocab_size: int = 50) -> None:
        super().__init__(tokens)
        self._seed, self._rng, self._vocab_size = seed, rng, vocab_size

    def look(self) -> bool:
        return True

    def expected(self, count: int) -> float:
        return 1e9  # whatever it costs

    def draft(self, most: int, least_chance: float) -> list[int]:
        count = self._rng.randint(0, max(0, most))
        right = self._rng.choice([0, 1, count // 2, count, count])
        draft = expected_output(self._tokens, self._seed, count, self._vocab_size)
        return [token if i < right else (token + 1) % self._vocab_size for i, token in enumerate(draft)]


_PRIME = (1 << 61) - 1


def fingerprint(tokens: list[int]) -> int:
    """A number that stands for all of ``tokens``."""
    return fingerprints(tokens)[-1] if tokens else 1


def fingerprints(tokens: list[int]) -> list[int]:
    """Of the first token, the first two, ..., all of them."""
    return list(accumulate(tokens, lambda value, token: (value * 1_000_003 + token + 7) % _PRIME, initial=1))[1:]


def expected_token(tokens: list[int], seed: int, vocab_size: int) -> int:
    """The token that FakeBackend samples after ``tokens``."""
    return (fingerprint(tokens) * 31 + seed * 1_000_003) % _PRIME % vocab_size


def expected_scores(prompt: list[int]) -> list[TokenLogprobs]:
    """What FakeBackend says of the prompt's tokens behind the first."""
    values = [-(value % 1000) / 8 for value in fingerprints(prompt)[1:]]
    return [TokenLogprobs((value, 1 + i % 3), []) for i, value in enumerate(values)]


def expected_vector(prompt: list[int]) -> list[float]:
    """What FakeBackend makes of a prompt that is pooled."""
    return [float(fingerprint(prompt) % 1000), 1.0]


def allowed_token(token: int, mask: bytes | None, vocab_size: int) -> int:
    """What FakeBackend samples in place of ``token`` under ``mask``: the next one that is allowed."""
    if mask is None:
        return token
    return next(t for i in range(vocab_size) if mask[(t := (token + i) % vocab_size) >> 3] >> (t & 7) & 1)


def candidates(tokens: list[int], count: int, vocab_size: int) -> list[tuple[int, float]]:
    """The ``count`` most likely tokens after ``tokens``, with made-up log-probabilities, all different."""
    value = fingerprint(tokens)
    scored = [(token, -((value * (token + 1) * 7919) % 10_007) / 1000 - token * 1e-6) for token in range(vocab_size)]
    return sorted(scored, key=lambda entry: -entry[1])[:count]


def expected_output(prompt: list[int], seed: int, count: int, vocab_size: int = 50) -> list[int]:
    """The ``count`` tokens that follow ``prompt`` in an undisturbed run."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_token(tokens, seed, vocab_size))
    return tokens[len(prompt) :]
