"""Requests, and the tokens of their prompts.

A long trace has more prompt tokens than memory should hold (145 million in Mooncake's conversations): a ``TraceRequest``
carries lengths only, and ``prompt_token_ids`` makes its tokens when they are needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import shake_128
from itertools import islice
from random import Random

from quire.errors import ConfigError
from quire.workload.lengths import Lengths, draw_lengths

PREFIX_BLOCK = 512
"""Tokens that one of ``TraceRequest.prefix_ids`` stands for."""


@dataclass(slots=True, frozen=True)
class WorkloadRequest:
    """One request: its prompt, and how many tokens it generates."""

    prompt_token_ids: list[int]
    output_tokens: int


@dataclass(slots=True, frozen=True)
class TraceRequest:
    """One request by its lengths."""

    arrival_s: float | None
    """Seconds from the start of the trace; None: the trace has no times."""
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] | None = None
    """Ids of the prompt's blocks of ``PREFIX_BLOCK`` tokens, the last one cut short. Equal ids: the prompts are the same from
    their beginning to the end of that block. None: the prompt shares nothing."""


def synthetic(num_requests: int, prompt: Lengths, output: Lengths, vocab_size: int, seed: int = 0) -> list[WorkloadRequest]:
    """``num_requests`` requests with random tokens. The first n are the same for any larger number.

    Raises ConfigError for a number below 1.
    """
    _check_number(num_requests)
    random = Random(f"{seed}/tokens").random
    lengths = draw_lengths(prompt, output, seed)
    made = []
    for _ in range(num_requests):
        prompt_length, output_length = next(lengths)
        made.append(WorkloadRequest([int(random() * vocab_size) for _ in range(prompt_length)], output_length))
    return made


def draw_requests(num_requests: int, prompt: Lengths, output: Lengths, seed: int = 0) -> list[TraceRequest]:
    """Requests with the lengths that ``synthetic`` draws, without times and without tokens.

    Raises ConfigError for a number below 1.
    """
    _check_number(num_requests)
    return [TraceRequest(None, *lengths) for lengths in islice(draw_lengths(prompt, output, seed), num_requests)]


def prompt_token_ids(request: TraceRequest, number: int, vocab_size: int, seed: int = 0) -> list[int]:
    """The ``request.prompt_tokens`` tokens of a prompt, below ``vocab_size``.

    The tokens of a prefix block are a function of its id and ``vocab_size`` alone. A request without ids gets tokens of its
    own, a function of ``seed`` and ``number`` (its place in the trace). About 0.1 µs a token.
    """
    length = request.prompt_tokens
    if request.prefix_ids is None:
        return _token_ids(f"{seed}/{number}", length, vocab_size)
    tokens: list[int] = []
    for block in request.prefix_ids:
        tokens += _token_ids(f"block {block}", min(PREFIX_BLOCK, length - len(tokens)), vocab_size)
    return tokens


def _token_ids(key: str, count: int, vocab_size: int) -> list[int]:
    """The first ``count`` of the endless random tokens that belong to ``key``."""
    # A hash with an output of any length: as fast as Random.random(), quicker to start, and the same in every version of Python.
    words = struct.unpack(f"<{count}I", shake_128(key.encode()).digest(4 * count))
    return [word % vocab_size for word in words]


def _check_number(num_requests: int) -> None:
    if num_requests < 1:
        raise ConfigError(f"the number of requests must be at least 1, got {num_requests}")
