"""Request and Sequence: what a client asked, and one stream of tokens of it, counted in tokens.

A sequence knows ``num_tokens`` tokens (prompt and generated) and has computed the KV of the first ``num_computed`` of
them. A step computes some of the difference. There is no prefill and no decode: a prompt, a chunk of it, the one new
token, the recompute after a preemption are all the same case.

    tokens        [ prompt ........................ | generated ....... ]
    num_computed  [ KV in blocks ......... ]
    the next step                           [ count ]  the last position's logits give a token once all are computed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from quire.sampling_params import SamplingParams


@dataclass(slots=True, frozen=True)
class Request:
    """What a client asked. Ends in exactly one final output for each of its ``params.n`` sequences."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """0 <= seed < 2**64; drawn by the caller where ``params.seed`` is None, and kept for the request's life."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-text tokens."""


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens. Only the scheduler changes it; only the block manager changes ``block_table``."""

    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    seed: int
    max_tokens: int
    """Tokens to generate at most: the request's limit or what the context leaves."""
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    """Logical block → physical block id. Holds every position below num_computed."""
    row: int = -1
    """Row in the backend's tables while RUNNING, else -1."""
    status: Status = Status.WAITING

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that min_tokens bans: end-of-text (also where it is ignored as an end) and stop tokens."""
        return (*self.request.eos_token_ids, *(self.request.params.stop_token_ids or ()))

    def end_reason(self) -> tuple[str, int | None] | None:
        """(finish_reason, stop_reason) if the newest token ends the sequence, else None."""
        params, token = self.request.params, self.tokens[-1]
        if self.num_generated >= params.min_tokens:
            if token in (params.stop_token_ids or ()):
                return "stop", token
            if token in self.request.eos_token_ids and not params.ignore_eos:
                return "stop", None
        if self.num_generated >= self.max_tokens:
            return "length", None
        return None


def derive_seed(seed: int, index: int) -> int:
    """Seed of the request's index-th sequence: the request's own for the first, then spread by an odd constant (Weyl)."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 64)
