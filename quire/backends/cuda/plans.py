"""A StepPlan as bytes, for the processes that compute parts of it. Plain values in Python's own marshal format: it runs no code."""

from __future__ import annotations

import marshal
from typing import Any

from quire.core.plan import RowStart, RowWork, StepPlan
from quire.sampling_params import SamplingParams

_PARAMS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "logprobs",
    "prompt_logprobs",
)  # fmt: skip
"""What a backend reads of a request's parameters, beside logit_bias. max_tokens is not among them: the engine counts."""


def encode(plan: StepPlan) -> bytes:
    starts = [
        (start.row, start.tokens, start.num_prompt, [getattr(start.params, name) for name in _PARAMS], dict(start.params.logit_bias or {}),
         start.seed, start.stop_ids, start.num_candidates, start.pooling)
        for start in plan.starts
    ]  # fmt: skip
    work = [
        (w.row, w.start, w.count, w.new_blocks, w.sample, w.first_block, list(w.tokens), w.write, list(w.masks), list(w.draft),
         (w.score.start, w.score.stop))
        for w in plan.work
    ]  # fmt: skip
    return marshal.dumps((starts, work, plan.copies))


def decode(data: bytes) -> StepPlan:
    starts, work, copies = marshal.loads(data)
    return StepPlan([_start(*each) for each in starts], [_work(*each) for each in work], copies)


def _start(row: int, tokens: list[int], num_prompt: int, values: list[Any], bias: dict[int, float], *rest: Any) -> RowStart:
    params = SamplingParams(**dict(zip(_PARAMS, values, strict=True)), logit_bias=bias, max_tokens=None)
    return RowStart(row, tokens, num_prompt, params, *rest)


def _work(row: int, start: int, count: int, new_blocks: list[int], sample: bool, *rest: Any) -> RowWork:
    first_block, tokens, write, masks, draft, (begin, end) = rest
    return RowWork(row, start, count, new_blocks, sample, first_block, tokens, write, masks, draft, range(begin, end))
