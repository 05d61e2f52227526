"""What each admission policy promises, on the real scheduler with made-up lengths."""

from __future__ import annotations

import random

import pytest

from core.fake_backend import FakeBackend
from quire.config import EngineConfig
from quire.core.admission import Footprint, NoEvict, Watermark
from quire.core.engine import Engine
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.past_future import Lifetimes, PastFuture
from quire.core.plan import StepPlan, StepResult, accepted
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

EOS = 1


class Lengths(FakeBackend):
    """Ends each request after the number of tokens that its seed says, without looking at what the blocks hold."""

    def execute(self, plan: StepPlan) -> StepResult:
        for start in plan.starts:
            self.left = getattr(self, "left", {})
            self.left[start.row] = start.seed - (len(start.tokens) - start.num_prompt)
        result = StepResult()
        for work in plan.work:
            if work.sample:
                tokens = [EOS if self.left[work.row] <= 1 + i else 0 for i in range(1 + len(work.draft))]
                self.left[work.row] -= accepted(work.draft, tokens)
                result.tokens += tokens
                result.logprobs += [None] * len(tokens)
        return result


def serve(admission: str, seed: int, *, limit: int = 200, requests: int = 150, groups: KVGroups = ONE_GROUP) -> tuple[int, int, float]:
    """(preemptions, recomputed tokens, mean share of the pool in use while somebody waits)"""
    rng, blocks = random.Random(seed), 200 * groups.width
    engine = Engine(
        Lengths(blocks, 4, 256, 50, window=groups.window, groups=(groups.full, groups.windowed)),
        EngineConfig(max_num_seqs=200, max_num_batched_tokens=4096, admission=admission, max_waiting=1000),
    )
    for i in range(requests):
        length = min(limit, max(1, round(rng.lognormvariate(3.3, 0.8))))
        prompt = [rng.randrange(50) for _ in range(rng.randrange(4, 40))]
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=limit), length, (EOS,)))
    used = []
    while engine.has_work:
        engine.step()
        if engine.scheduler.waiting:
            used.append(engine.scheduler.manager.pool.num_owned / blocks)
    stats = engine.stats()
    return stats.preemptions, stats.tokens_recomputed, sum(used) / len(used)


@pytest.mark.parametrize("seed", range(5))
def test_no_evict_never_preempts(seed: int) -> None:
    preemptions, _, used = serve("no-evict", seed)
    assert preemptions == 0
    assert used > 0.1


def test_past_future_uses_most_of_the_pool_and_computes_little_again() -> None:
    _, careless, full = serve("watermark", 0, requests=600)
    _, lost, used = serve("past-future", 0, requests=600)
    assert used > 0.85
    assert full > used
    assert lost < careless / 3


def test_no_evict_knows_the_exact_peak() -> None:
    """Against counting the blocks of every step."""
    rng = random.Random(1)
    for _ in range(200):
        size = rng.choice([1, 3, 4, 16])
        running = [
            Footprint(-(-positions // size), 0, positions, rng.randrange(0, 40))
            for positions in (rng.randrange(1, 60) for _ in range(rng.randrange(1, 8)))
        ]
        last = max(s.remaining for s in running)
        peak = max(sum(-(-(s.positions + t) // size) for s in running if t <= s.remaining) for t in range(last + 1))
        policy = NoEvict(size)
        policy.survey(running, 0)
        assert policy.peak() == peak


def test_watermark_keeps_one_percent_for_those_that_run() -> None:
    policy = Watermark(4)
    policy.survey([Footprint(100, 5, 400, 50)], 100)
    assert policy.admits(Footprint(0, 0, 98 * 4, 50))
    policy.survey([Footprint(100, 5, 400, 50)], 100)
    assert not policy.admits(Footprint(0, 0, 99 * 4, 50))


def test_lifetimes_are_not_fooled_by_those_that_end_first() -> None:
    """A hundred sequences of 400 tokens and a hundred of 20: after 50 steps only the short ones have ended."""
    lifetimes = Lifetimes(1000)
    for _ in range(100):
        lifetimes.ended(20, True)
    counts, ages = [0] * (len(lifetimes.edges) - 1), [0] * (len(lifetimes.edges) - 1)
    counts[lifetimes.bucket(50)], ages[lifetimes.bucket(50)] = 100, 100 * 50
    table = lifetimes.survival(counts, ages, [40])
    assert 0.35 < table[0][0] < 0.65
    assert table[lifetimes.bucket(50)][0] > 0.6


def test_past_future_does_not_expect_more_than_the_limits_allow() -> None:
    policy = PastFuture(4, 1000)
    policy.survey([Footprint(10, 0, 40, 4)] * 9, 30)
    assert policy.admits(Footprint(0, 0, 40, 4))
    policy.survey([Footprint(10, 0, 40, 900)] * 9, 30)
    assert not policy.admits(Footprint(0, 0, 40, 900))
