"""hypothesis drives the whole core with random operations; ``check()`` after each one.

Rules make short programs out of few tokens, so that prefixes coincide, fork and diverge all the time, on tiny pools, so that
sequences preempt, swap and evict each other. FakeBackend proves in every step that a row's blocks hold what belongs to the
row's tokens; here every output is compared with what an undisturbed run gives, and every sample must end exactly once.
"""

from __future__ import annotations

import os
import random
from functools import cache
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from core.fake_backend import FakeBackend, ScriptedDrafter, candidates, expected_output, expected_scores, expected_vector
from quire.config import EngineConfig
from quire.core.beam import BeamSearch
from quire.core.engine import Engine
from quire.core.groups import KVGroups
from quire.core.sequence import Request, Retention, derive_seed
from quire.errors import InvalidRequestError, QueueFullError
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams

DEPTH = int(os.environ.get("QUIRE_TEST_DEPTH", "1"))
"""So many times 500 programs; each run makes up others."""
VOCAB = 50
SALTS = [b"", b"tenant"]


@cache
def expected_beams(prompt: tuple[int, ...], width: int, n: int, limit: int, eos: tuple[int, ...]) -> list[list[int]]:
    """What a beam search gives where every beam is computed from its tokens alone."""
    search = BeamSearch(width, limit, eos, num_return=n)
    beams = [list(prompt)]
    while moves := search.advance([candidates(beam, search.num_candidates, VOCAB) for beam in beams]):
        beams = [[*beams[move.parent], move.token] for move in moves]
    return [hypothesis.token_ids for hypothesis in search.hypotheses()]


class CoreMachine(RuleBasedStateMachine):
    """add, step, abort, preempt, reset in any order; n, best_of, beams, scored and pooled prompts, salts, priorities, retention, swap,
    windows, and drafts that are right up to anywhere."""

    device = FakeBackend

    @initialize(
        block_size=st.sampled_from([1, 2, 3, 4, 5, 7, 16]),
        blocks=st.integers(2, 14),
        rows=st.integers(1, 6),
        budget=st.integers(1, 20),
        host=st.sampled_from([0, 0, 2, 5, 20]),
        window=st.sampled_from([0, 0, 1, 3, 6, 9]),
        groups=st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 1), (2, 3)]),
        caching=st.sampled_from([True, True, True, False]),
        admission=st.sampled_from(["watermark", "no-evict", "past-future"]),
        guesses=st.sampled_from([0, 0, 2, 5, 8, 30]),
    )
    def start(
        self,
        block_size: int,
        blocks: int,
        rows: int,
        budget: int,
        host: int,
        window: int,
        groups: tuple[int, int],
        caching: bool,
        admission: str,
        guesses: int,
    ) -> None:
        longest = max(2, min(24, blocks * block_size - block_size // 2))
        kinds = KVGroups(*groups, window) if window else KVGroups()
        blocks = max(blocks, kinds.blocks(longest, block_size, budget))
        self.now = 0.0
        self.backend = self.device(blocks, block_size, longest, VOCAB, num_host_blocks=host, window=window, groups=groups)
        config = EngineConfig(
            max_num_seqs=max(1, min(rows, blocks // kinds.width)),
            max_num_batched_tokens=budget,
            prefix_caching=caching,
            admission=admission,
            max_waiting=40,
            speculation="prompt-lookup" if guesses else "off",
            speculation_positions=guesses or 2,
        )
        self.engine = Engine(self.backend, config, lambda: self.now)
        self.requests: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: set[tuple[str, int]] = set()
        self.scored: set[tuple[str, int]] = set()
        """Which have put something out."""
        self.added = 0

    @rule(
        data=st.data(),
        length=st.integers(1, 20),
        pattern=st.integers(0, 3),
        kind=st.sampled_from(["one", "one", "n", "best_of", "beams", "scored", "prompt only", "mean", "last"]),
        salt=st.sampled_from(SALTS),
        priority=st.integers(-1, 1),
        eos=st.sets(st.integers(0, VOCAB - 1), max_size=6),
    )
    def add(self, data: st.DataObject, length: int, pattern: int, kind: str, salt: bytes, priority: int, eos: set[int]) -> None:
        length = min(length, self.backend.max_model_len - 1)
        prompt = [pattern % 2] * length
        if pattern > 1:  # equal up to somewhere
            prompt[length * 2 // 3 :] = [5 + i for i in range(length - length * 2 // 3)]
        limit = data.draw(st.integers(1, self.backend.max_model_len - length))
        size = data.draw(st.integers(1, 4))
        params = {
            "one": SamplingParams(max_tokens=limit),
            "n": SamplingParams(max_tokens=limit, n=size),
            "best_of": SamplingParams(max_tokens=limit, n=1, best_of=size),
            "beams": SamplingParams(max_tokens=limit, n=size, beam_width=size + 1),
            "scored": SamplingParams(max_tokens=limit, n=size, prompt_logprobs=0),
            "prompt only": SamplingParams(max_tokens=0, n=size, prompt_logprobs=0),
        }.get(kind, SamplingParams(max_tokens=0))
        pooling: Any = kind if kind in ("mean", "last") else None
        retention = Retention(8, 2.0) if size == 3 else None
        name = str(self.added)
        self.added += 1
        request = Request(name, prompt, params, size, tuple(sorted(eos)), priority, salt, retention, pooling)
        try:
            self.engine.add(request)
        except InvalidRequestError:  # beams that can't fit at the same time
            assert kind == "beams"
            return
        except QueueFullError:
            assert len(self.engine.scheduler.waiting) >= 40
            return
        self.requests[name] = request
        for seq in self.engine.scheduler.waiting:
            if seq.request is request and not params.use_beam_search:
                seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(size))
        for index in range(params.n if params.use_beam_search else params.num_sequences):
            self.got[(name, index)] = []
        self.engine.check()

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.now += 0.25
            for output in self.engine.step():
                key = (output.request_id, output.index)
                assert key not in self.ended
                self.got[key] += output.token_ids
                self._look(key, output)
                if output.finish_reason is not None:
                    self._end(key, output.finish_reason)
            self.engine.check()

    def _look(self, key: tuple[str, int], output: SequenceOutput) -> None:
        """Scores and vectors come with the first output, once, whole and right."""
        request = self.requests[key[0]]
        if output.prompt_logprobs is not None or output.vector is not None or key not in self.scored:
            wanted = request.params.prompt_logprobs is not None and key[1] == 0
            assert key not in self.scored
            assert output.prompt_logprobs == (expected_scores(request.prompt_token_ids) if wanted else None)
            assert output.vector == (expected_vector(request.prompt_token_ids) if request.pooling else None)
        self.scored.add(key)

    @precondition(lambda self: len(self.ended) < len(self.got))
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        live = sorted(key for key in self.got if key not in self.ended)
        name, index = data.draw(st.sampled_from(live))
        for output in self.engine.abort(name, None if whole else index):
            assert output.finish_reason == "abort"
            self._end((name, output.index), "abort")
        self.engine.check()

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(at=st.integers(0, 5))
    def preempt(self, at: int) -> None:
        running = self.engine.scheduler.running
        self.engine.scheduler.preempt(min(at, len(running) - 1), "memory", "the test says so")
        self.engine.check()

    @rule()
    def reset(self) -> None:
        self.engine.reset_prefix_cache()
        self.engine.check()
        assert self.engine.stats().kv.cached_blocks == 0

    def _end(self, key: tuple[str, int], reason: str) -> None:
        assert key not in self.ended
        self.ended.add(key)
        request, got = self.requests[key[0]], self.got[key]
        params, prompt = request.params, request.prompt_token_ids
        if reason == "error":
            assert params.use_beam_search
            return
        if params.use_beam_search:
            if reason != "abort":
                limit = params.max_tokens or 0
                beams = expected_beams(tuple(prompt), params.num_beams, params.n, limit, request.eos_token_ids)
                assert got == beams[key[1]]
            return
        assert got == expected_output(prompt, derive_seed(request.seed, key[1]), len(got))
        if reason == "length":
            assert len(got) == params.max_tokens
        if reason == "stop":
            assert got[-1] in request.eos_token_ids

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "the engine does not come to an end"
        assert set(self.got) == self.ended
        kv = self.engine.stats().kv
        assert (kv.used_blocks, kv.host_blocks_used, kv.saved_blocks) == (0, 0, 0)


TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=500 * DEPTH, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
