"""A device that has no memory for a step: its sequences come again in smaller ones, and nobody is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from core.fake_backend import FakeBackend, LateBackend, ScriptedDrafter, expected_output
from core.test_constraint import Rules
from quire.config import EngineConfig
from quire.core import scheduler
from quire.core.engine import Engine
from quire.core.plan import StepPlan, StepResult
from quire.core.sequence import Request
from quire.errors import StepMemoryError
from quire.sampling_params import SamplingParams


class Small(FakeBackend):
    """Fails steps of more than ``most`` positions."""

    most = 1 << 20
    failed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.look(plan)
        return super().execute(plan)

    def look(self, plan: StepPlan) -> None:
        if plan.num_tokens > self.most:
            self.failed += 1
            for source, destination in plan.copies:
                self.pool[destination] = list(self.pool[source])
            raise StepMemoryError("no memory")


class SmallAndLate(Small, LateBackend):
    def execute(self, plan: StepPlan) -> StepResult:
        raise AssertionError("steps are launched here")

    def launch(self, plan: StepPlan) -> StepPlan:
        self.look(plan)
        self.in_flight.append((plan, FakeBackend.execute(self, plan)))
        return plan


def make(kind: type[Small], **options: Any) -> tuple[Small, Engine]:
    backend = kind(num_blocks=64, num_host_blocks=8, max_model_len=60)
    defaults: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "speculation": "off"}
    return backend, Engine(backend, EngineConfig(**defaults | options), constraints=Rules())


def run(engine: Engine) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            assert output.finish_reason in (None, "length")
        engine.check()
    assert engine.stats().kv.used_blocks == 0
    return found


@pytest.mark.parametrize("kind", [Small, SmallAndLate])
@pytest.mark.parametrize("most", [1, 3, 7, 20])
def test_nobody_is_lost(kind: type[Small], most: int) -> None:
    """Memory that goes away in the middle, and comes back."""
    backend, engine = make(kind)
    rng = random.Random(most)
    prompts = {f"{i}": [rng.randrange(50) for _ in range(rng.randint(1, 30))] for i in range(12)}
    for i, prompt in enumerate(prompts.values()):
        engine.add(Request(f"{i}", prompt, SamplingParams(max_tokens=20, n=1 + i % 2), i))
    found: dict[tuple[str, int], list[int]] = {}
    for step in range(60):
        backend.most = most if 5 <= step < 40 else 1 << 20
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        engine.check()
    for key, tokens in run(engine).items():
        found.setdefault(key, []).extend(tokens)
    assert backend.failed > 0
    assert engine.stats().kv.counters.preempted["device"] > 0
    for i, (name, prompt) in enumerate(prompts.items()):
        assert found[name, 0] == expected_output(prompt, i, 20)


@pytest.mark.parametrize("host", [0, 24])
def test_drafts_of_a_step_that_failed_leave_nothing(host: int) -> None:
    """Their blocks were taken before the step failed, and go back with it: none is swapped out, or comes back."""
    drafted = failed = 0
    for seed in range(16):
        backend = Small(num_blocks=64, num_host_blocks=host, max_model_len=60, block_size=1)
        engine = Engine(backend, EngineConfig(speculation="prompt-lookup", speculation_positions=8))
        engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=20), 0))
        (seq,) = engine.scheduler.waiting
        seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(seed))
        found: list[int] = []
        rng = random.Random(seed)
        while engine.has_work:
            backend.most = rng.choice([1, 1 << 20, 1 << 20])
            for output in engine.step():
                found += output.token_ids
            engine.check()
        assert found == expected_output([1, 2, 3], 0, 20)
        if backend.failed:
            drafted += engine.stats().tokens_drafted
        failed += backend.failed
    assert drafted > 0
    assert failed > 0


def test_drafts_keep_to_what_a_device_can_compute() -> None:
    """A step of 1 + 7 positions fails, and the next one is as small as the last retreat says, drafts included."""
    backend = Small(num_blocks=64, max_model_len=60)
    engine = Engine(backend, EngineConfig(speculation="prompt-lookup", speculation_positions=8))
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=20), 0))
    (seq,) = engine.scheduler.waiting
    seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(0))
    backend.most = 4
    found: list[int] = []
    for _ in range(100):
        for output in engine.step() if engine.has_work else ():
            found += output.token_ids
    assert found == expected_output([1, 2, 3], 0, 20)


@pytest.mark.parametrize("kind", [Small, SmallAndLate])
def test_steps_grow_again(kind: type[Small]) -> None:
    backend, engine = make(kind)
    engine.add(Request("a", [1] * 30, SamplingParams(max_tokens=10), 0))
    backend.most = 8
    engine.step()
    assert engine.scheduler.max_num_batched_tokens == 15
    engine.step()
    assert engine.scheduler.max_num_batched_tokens == 7
    backend.most = 1 << 20
    assert run(engine)["a", 0] == expected_output([1] * 30, 0, 10)
    for i in range(4 * scheduler.TRUST):
        engine.add(Request(f"{i}", [2], SamplingParams(max_tokens=1), 0))
        run(engine)
    assert engine.scheduler.max_num_batched_tokens == 32


@pytest.mark.parametrize("kind", [Small, SmallAndLate])
def test_a_device_without_memory_for_one_position_is_unusable(kind: type[Small]) -> None:
    backend, engine = make(kind)
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=10), 0))
    backend.most = 0
    with pytest.raises(StepMemoryError):
        run(engine)
