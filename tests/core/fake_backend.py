"""A backend without a model: it replays plans into rows and checks that they make sense."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.core.plan import RowStart, StepPlan, StepResult
from quire.outputs import TokenLogprobs


@dataclass
class Vocab:
    vocab_size: int = 50


@dataclass
class Row:
    tokens: list[int]
    start: RowStart
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class FakeBackend:
    """Writes (row token, position) into a pool by the plan, as a real backend writes KV, and reads it back.

    The sampled token is a hash of every token that the row's blocks hold, so a wrong block table, a block with two
    owners or a skipped position changes the output.
    """

    def __init__(self, num_blocks: int = 16, block_size: int = 4, max_model_len: int = 32, vocab_size: int = 50) -> None:
        self.spec = Vocab(vocab_size)
        self.num_blocks, self.block_size, self.max_model_len = num_blocks, block_size, max_model_len
        self.pool: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.fail_rows: set[int] = set()
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for start in plan.starts:
            self.rows[start.row] = Row(list(start.tokens), start)
        for source, destination in plan.copies:
            self.pool[destination] = list(self.pool[source])
        result = StepResult()
        for work in plan.work:
            row = self.rows[work.row]
            assert work.count > 0
            assert work.start == row.computed, "positions are computed in order, none twice"
            row.blocks += work.new_blocks
            for position in range(work.start, work.start + work.count):
                self.pool[row.blocks[position // self.block_size]][position % self.block_size] = row.tokens[position]
            row.computed += work.count
        for work in plan.work:  # read after every write of the step, so that a shared block shows
            if work.sample:
                row = self.rows[work.row]
                assert row.computed == len(row.tokens)
                held = [self.pool[row.blocks[p // self.block_size]][p % self.block_size] for p in range(row.computed)]
                assert held == row.tokens, "the row's blocks hold something else than its tokens"
                if work.row in self.fail_rows:
                    result.tokens.append(-1)
                    result.logprobs.append(None)
                    result.errors[work.row] = "logits are not finite"
                    continue
                token = expected_token(row.tokens, row.start.seed, self.spec.vocab_size)
                row.tokens.append(token)
                result.tokens.append(token)
                result.logprobs.append(TokenLogprobs((-1.0, 1), []) if row.start.params.logprobs is not None else None)
        return result


def expected_token(tokens: list[int], seed: int, vocab_size: int) -> int:
    """The token that FakeBackend samples after ``tokens``."""
    value = seed + 1
    for token in tokens:
        value = (value * 1_000_003 + token) % ((1 << 61) - 1)
    return value % vocab_size


def expected_output(prompt: list[int], seed: int, count: int, vocab_size: int = 50) -> list[int]:
    """The ``count`` tokens that follow ``prompt`` in an undisturbed run."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_token(tokens, seed, vocab_size))
    return tokens[len(prompt) :]
