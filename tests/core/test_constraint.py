"""Constraints in the engine: masks go with the rows that are sampled, forced tokens are known without being sampled, and neither
chunks nor preemption nor a restart nor log-probabilities change what comes out."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest

from core.fake_backend import FakeBackend, allowed_token, expected_token
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.core.speculation import Drafter
from quire.errors import EngineError, InvalidRequestError
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.structured import Structured

VOCAB = 50
FORM = Structured.regex("anything")


class Rule:
    """After a token divisible by 3 come 1, 2, 4 and no others; else even tokens may follow. ``length`` tokens are complete."""

    def __init__(self, length: int, made: Seq[int], broken_at: int) -> None:
        self.made: list[int] = []
        self.length, self.broken_at = length, broken_at
        self.forced: list[int] = []
        self.advance(made)

    @property
    def mask(self) -> bytes:
        allowed = self.forced[:1] or range(0, VOCAB, 2)
        return sum(1 << token for token in allowed).to_bytes(8, "little")

    @property
    def complete(self) -> bool:
        return len(self.made) == self.length

    def foresee(self, tokens: Seq[int]) -> list[bytes | None]:
        masks: list[bytes | None] = [self.mask]
        ahead = Rule(self.length, self.made, 1 << 30)  # it breaks when it gets there
        for token in tokens:
            if not ahead.mask[token >> 3] >> (token & 7) & 1:
                break
            ahead.advance([token])
            if ahead.complete:
                break
            masks.append(ahead.mask)
        return masks

    def advance(self, tokens: Seq[int]) -> None:
        for token in tokens:
            assert self.mask[token >> 3] >> (token & 7) & 1, "a token that the mask did not allow"
            self.made.append(token)
            self.forced = self.forced[1:] or ([1, 2, 4][: self.length - len(self.made)] if token % 3 == 0 else [])
        if len(self.made) >= self.broken_at:
            raise EngineError("the rule is broken")


class Rules:
    def __init__(self, length: int = 14, broken_at: int = 1000) -> None:
        self.length, self.broken_at = length, broken_at

    def prepare(self, structured: Structured | None) -> None: ...

    def open(self, params: SamplingParams, made: Seq[int]) -> Rule:
        return Rule(self.length, made, self.broken_at)


def expected(prompt: list[int], seed: int, length: int) -> list[int]:
    rule, tokens = Rule(length, (), 1000), list(prompt)
    while not rule.complete:
        tokens.append(allowed_token(expected_token(tokens, seed, VOCAB), rule.mask, VOCAB))
        rule.advance(tokens[-1:])
    return tokens[len(prompt) :]


def make(rules: Rules | None = None, **options: object) -> tuple[Engine, FakeBackend]:
    backend = FakeBackend(num_blocks=24, max_model_len=40, vocab_size=VOCAB)
    config = EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, "admission": "watermark", **options})  # type: ignore[arg-type]
    return Engine(backend, config, constraints=rules or Rules()), backend


def collect(engine: Engine, preempt_every: int = 0, steps: int = 1 << 30) -> dict[tuple[str, int], list[SequenceOutput]]:
    found: dict[tuple[str, int], list[SequenceOutput]] = {}
    step = 0
    while engine.has_work and step < steps:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
        step += 1
        if preempt_every and step % preempt_every == 0 and engine.scheduler.running:
            engine.scheduler.preempt(0, "memory", "the test says so")
    return found


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


PROMPT = [7, 8, 9, 10, 11]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 1}, {"max_num_batched_tokens": 3}, {"prefix_caching": False}])
@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("preempt_every", [0, 7])
def test_the_same_tokens_whatever_happens(options: dict[str, object], logprobs: int | None, preempt_every: int) -> None:
    engine, _ = make(**options)
    for i in range(3):
        params = SamplingParams(max_tokens=20, n=2, structured=FORM, logprobs=logprobs)
        engine.add(Request(f"r{i}", PROMPT[: 2 + i], params, seed=i))
    plain = SamplingParams(max_tokens=9)
    engine.add(Request("plain", PROMPT, plain, seed=3))
    found = collect(engine, preempt_every)
    for i in range(3):
        outputs = found[f"r{i}", 0]
        assert tokens_of(outputs) == expected(PROMPT[: 2 + i], i, 14)
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason, outputs[-1].end_token) == ("stop", None, False)
        for output in outputs:
            assert output.logprobs is None if logprobs is None else len(output.logprobs or ()) == len(output.token_ids)
    assert tokens_of(found["plain", 0]) != expected(PROMPT, 3, 9)
    assert found["plain", 0][-1].finish_reason == "length"


class Outcome(Drafter):
    """Guesses what will come, now right, now wrong from some token on."""

    def __init__(self, tokens: list[int], outcome: list[int], rng: random.Random) -> None:
        super().__init__(tokens)
        self._all, self._rng = outcome, rng

    def look(self) -> bool:
        return True

    def expected(self, count: int) -> float:
        return 1e9  # whatever it costs

    def draft(self, most: int, least_chance: float) -> list[int]:
        draft = self._all[len(self._tokens) : len(self._tokens) + most]
        right = self._rng.randint(0, len(draft))
        return draft[:right] + [(token + self._rng.randint(1, 9)) % VOCAB for token in draft[right:]]


@pytest.mark.parametrize("seed", range(12))
def test_guesses_change_nothing(seed: int) -> None:
    rng = random.Random(seed)
    engine, backend = make(prefix_caching=seed % 2 == 0)
    logprobs = [None, 0][seed % 2]
    for i in range(2):
        engine.add(Request(f"r{i}", PROMPT[i:], SamplingParams(max_tokens=20, structured=FORM, logprobs=logprobs), seed=seed + i))
    for i, seq in enumerate(engine.scheduler.waiting):
        seq.drafter = Outcome(seq.tokens, [*PROMPT[i:], *expected(PROMPT[i:], seed + i, 14)], rng)
    found = collect(engine, preempt_every=5)
    for i in range(2):
        assert tokens_of(found[f"r{i}", 0]) == expected(PROMPT[i:], seed + i, 14)
        assert found[f"r{i}", 0][-1].finish_reason == "stop"
    assert any(work.draft for plan in backend.plans for work in plan.work)


def test_forced_tokens_cost_no_steps() -> None:
    costs = []
    for logprobs in (None, 0):
        engine, _ = make()
        engine.add(Request("r", PROMPT, SamplingParams(max_tokens=20, structured=FORM, logprobs=logprobs), seed=0))
        collect(engine)
        costs.append(engine.stats().tokens_sampled)
    assert costs[1] == 14
    assert costs[0] < 14


@pytest.mark.parametrize("logprobs", [None, 0])
def test_resumed_anywhere(logprobs: int | None) -> None:
    """Also in the middle of what is forced, as where log-probabilities are asked for."""
    whole = expected(PROMPT, 5, 14)
    params = SamplingParams(max_tokens=20, structured=FORM, logprobs=logprobs)
    for steps in range(1, 14):
        engine, _ = make()
        engine.add(Request("r", PROMPT, params, seed=5))
        made = tokens_of(collect(engine, steps=steps).get(("r", 0), []))
        if not engine.has_work:
            break
        again, _ = make()
        again.add(Request("r", PROMPT, params, seed=5), [made])
        assert made + tokens_of(collect(again)["r", 0]) == whole


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("max_tokens", range(1, 17))
def test_a_limit_anywhere(max_tokens: int, logprobs: int | None) -> None:
    engine, _ = make()
    engine.add(Request("r", PROMPT, SamplingParams(max_tokens=max_tokens, structured=FORM, logprobs=logprobs), seed=0))
    outputs = collect(engine)["r", 0]
    assert tokens_of(outputs) == expected(PROMPT, 0, 14)[:max_tokens]
    assert outputs[-1].finish_reason == ("length" if max_tokens < 14 else "stop")


def test_a_stop_token_among_forced_ones() -> None:
    for logprobs in (None, 0):
        engine, _ = make()
        params = SamplingParams(max_tokens=20, structured=FORM, logprobs=logprobs, stop_token_ids=[2])
        engine.add(Request("r", PROMPT, params, seed=0))
        outputs = collect(engine)["r", 0]
        whole = expected(PROMPT, 0, 14)
        assert tokens_of(outputs) == whole[: whole.index(2) + 1]
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason, outputs[-1].end_token) == ("stop", 2, True)


def test_one_that_breaks_ends_alone() -> None:
    engine, _ = make(Rules(broken_at=4))
    engine.add(Request("r", PROMPT, SamplingParams(max_tokens=20, structured=FORM), seed=0))
    engine.add(Request("plain", PROMPT, SamplingParams(max_tokens=9), seed=3))
    found = collect(engine)
    assert (found["r", 0][-1].finish_reason, found["r", 0][-1].stop_reason) == ("error", "the rule is broken")
    assert found["plain", 0][-1].finish_reason == "length"
    assert engine.stats().kv.used_blocks == 0


def test_without_a_tokenizer_it_is_refused() -> None:
    engine = Engine(FakeBackend(), EngineConfig(max_num_seqs=4))
    for params in (SamplingParams(structured=FORM), SamplingParams(bad_words=["x"]), SamplingParams(allowed_token_ids=[1])):
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            engine.add(Request("r", PROMPT, params, seed=0))
    assert not engine.has_work
