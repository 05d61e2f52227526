"""Run requests on a real engine, without text: what the tests of numbers and bytes share."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.backends.base import open_backend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.core.speculation import Drafter
from quire.core.stats import EngineStats
from quire.grammar.constraints import Constraints
from quire.text.tokenizer import Tokenizer


@dataclass
class Output:
    """All of one sequence that must not depend on its company."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[Any, ...]] = field(default_factory=list)
    """(log-probability, rank, top) of each token; floats compare bit for bit."""
    finish_reason: str | None = None
    stop_reason: Any = None
    prompt_logprobs: list[tuple[Any, ...]] | None = None
    vector: list[float] | None = None


@dataclass
class Run:
    outputs: dict[tuple[str, int], Output]
    stats: EngineStats


def open_engine(folder: Path | str, *, constrained: bool = False, **options: Any) -> Engine:
    """constrained: requests may have structured output and the like; the folder has a tokenizer then."""
    config = EngineConfig(model=str(folder), **{"kv_memory": "16MiB", **options})
    backend = open_backend(config)
    spec = backend.spec
    constraints = Constraints(lambda: Tokenizer.load(backend.folder), spec.vocab_size, spec.eos_token_ids) if constrained else None
    return Engine(backend, config, constraints=constraints)


def positions(request: Request) -> int:
    """Positions that ``request`` needs at the same time when it runs alone: all of its beams', one sample's."""
    prompt, generated = len(request.prompt_token_ids), request.params.max_tokens or 0
    return prompt + 32 + (generated + 32) * request.params.num_beams if request.params.use_beam_search else prompt + generated


class Guesses(Drafter):
    """Drafts a sequence's ``outcome`` after ``prompt`` tokens: now all right, now wrong from some token on."""

    def __init__(self, tokens: list[int], prompt: int, outcome: list[int], vocab_size: int) -> None:
        super().__init__(tokens)
        self._prompt, self._outcome, self._vocab_size = prompt, outcome, vocab_size
        self._rng = random.Random(prompt)

    def look(self) -> bool:
        return True

    def expected(self, count: int) -> float:
        return 1e9  # whatever it costs

    def draft(self, most: int, least_chance: float) -> list[int]:
        at = len(self._tokens) - self._prompt
        draft = self._outcome[at : at + max(0, most)]
        right = self._rng.randint(0, len(draft) + 1)
        return draft[:right] + [(token + 1) % self._vocab_size for token in draft[right:]]


def run(
    engine: Engine,
    requests: list[Request],
    *,
    preempt_every: int = 0,
    outputs_to_guess: Mapping[tuple[str, int], Output] | None = None,
) -> Run:
    """Run ``requests`` to their end, ``check()`` after each step, and prove that nothing is left.

    preempt_every: every so many steps the oldest running sequence is preempted, whether there is a need or not.
    outputs_to_guess: what drafts are made from, where it is known.
    """
    for request in requests:
        engine.add(request)
    for seq in engine.scheduler.waiting if outputs_to_guess else ():
        outcome = outputs_to_guess.get((seq.request.request_id, seq.index), Output()).token_ids
        seq.drafter = Guesses(seq.tokens, seq.num_prompt, outcome, engine.backend.spec.vocab_size)
    outputs: dict[tuple[str, int], Output] = {}
    steps = 0
    while engine.has_work:
        for step in engine.step():
            output = outputs.setdefault((step.request_id, step.index), Output())
            output.token_ids += step.token_ids
            output.logprobs += [(*entry.token, tuple(entry.top)) for entry in step.logprobs or []]
            output.finish_reason, output.stop_reason = step.finish_reason, step.stop_reason
            if step.prompt_logprobs is not None:
                assert output.prompt_logprobs is None, "the prompt's log-probabilities came twice"
                output.prompt_logprobs = [(*entry.token, tuple(entry.top)) for entry in step.prompt_logprobs]
            output.vector = step.vector or output.vector
        engine.check()
        steps += 1
        if preempt_every and steps % preempt_every == 0 and engine.scheduler.running:
            engine.scheduler.preempt(0, "memory", "the test says so")
            engine.check()
    assert engine.stats().kv.used_blocks == 0
    return Run(outputs, engine.stats())
