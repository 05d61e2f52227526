"""hypothesis drives the core with random operations; ``check()`` after each one."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.fake_backend import FakeBackend, expected_output
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request, derive_seed
from quire.sampling_params import SamplingParams


class CoreMachine(RuleBasedStateMachine):
    """add, step, abort in any order, on tiny pools; preemptions and ends come by themselves.

    FakeBackend proves in every step that a row's blocks hold the row's tokens; here every output is compared with what an
    undisturbed run gives, and every sequence must end exactly once.
    """

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 5, 7, 16]),
        blocks=st.integers(1, 12),
        rows=st.integers(1, 6),
        budget=st.integers(1, 20),
    )
    def start(self, block_size: int, blocks: int, rows: int, budget: int) -> None:
        self.backend = FakeBackend(blocks, block_size, max_model_len=max(2, blocks * block_size - block_size // 2))
        if self.backend.max_model_len > blocks * block_size:
            self.backend.max_model_len = blocks * block_size
        self.engine = Engine(self.backend, EngineConfig(max_num_seqs=rows, max_num_batched_tokens=budget))
        self.requests: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()
        self.added = 0

    @precondition(lambda self: self.backend.max_model_len >= 2)
    @rule(data=st.data(), seed=st.integers(0, 1000), n=st.integers(1, 3), eos=st.sets(st.integers(0, 49), max_size=4))
    def add(self, data: st.DataObject, seed: int, n: int, eos: set[int]) -> None:
        prompt = data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=min(20, self.backend.max_model_len - 1)))
        limit = data.draw(st.integers(1, self.backend.max_model_len - len(prompt)))
        name = str(self.added)
        self.added += 1
        self.requests[name] = Request(name, prompt, SamplingParams(n=n, max_tokens=limit), seed, tuple(eos))
        self.engine.add(self.requests[name])
        for index in range(n):
            self.got[(name, index)] = []

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            for output in self.engine.step():
                key = (output.request_id, output.index)
                assert key not in self.ended
                self.got[key] += output.token_ids
                if output.finish_reason is not None:
                    self._end(key, output.finish_reason)
            self.engine.check()

    @precondition(lambda self: self.engine.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = sorted({name for name, index in self.got if (name, index) not in self.ended})
        name = data.draw(st.sampled_from(live))
        for output in self.engine.abort(name):
            assert output.finish_reason == "abort"
            self._end((name, output.index), "abort")

    def _end(self, key: tuple[str, int], reason: str) -> None:
        assert key not in self.ended
        self.ended.add(key)
        request = self.requests[key[0]]
        got = self.got[key]
        assert got == expected_output(request.prompt_token_ids, derive_seed(request.seed, key[1]), len(got))
        if reason == "length":
            assert len(got) == request.params.max_tokens
        if reason == "stop":
            assert got[-1] in request.eos_token_ids

    @invariant()
    def counts_are_right(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(10_000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "the engine does not come to an end"
        assert set(self.got) == self.ended
        assert self.engine.stats().kv.used_blocks == 0


# 200 runs of up to 100 operations: well over 10,000, each step of several counted once.
TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=200, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck))
