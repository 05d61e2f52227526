"""What a request gives back: text, tokens, log-probabilities, why it ended, and what it took.

``SequenceOutput`` is what the engine says after a step, in tokens; ``RequestOutput`` what the user gets, with text.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, frozen=True)
class Logprob:
    """Log-probability of one token at one position, from the model's unmodified logits."""

    logprob: float
    """Natural logarithm."""
    rank: int
    """1 for the most likely token; 0 where it is not known (beam search)."""
    decoded_token: str = ""


@dataclass(slots=True)
class Choice:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    """For each generated token: token id → Logprob; the chosen token comes first. None unless asked for."""
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort`` or ``error``; None while it runs."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-text token."""


@dataclass(slots=True)
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion's, where that is told apart."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class RequestOutput:
    """A finished request, in the order in which prompts were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Choice]
    usage: Usage = field(default_factory=Usage)
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """For each token of the prompt: token id → Logprob, the prompt's own comes first; None for the first token, which nothing
    predicts. None unless asked for."""


@dataclass(slots=True, frozen=True)
class Embedding:
    embedding: list[float]
    """Of length 1, rounded to float32."""


@dataclass(slots=True, frozen=True)
class EmbeddingOutput:
    """The vector of one prompt, in the order in which prompts were given."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: Embedding


def unit_vector(vector: Sequence[float]) -> list[float]:
    """``vector`` divided by its length, rounded to float32; zeros stay zeros."""
    length = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
    return array("f", [x / length for x in vector]).tolist()


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities of one sampled position, from the unmodified logits."""

    token: tuple[float, int]
    """(log-probability, rank from 1, 0 where it is not known) of the chosen token."""
    top: list[tuple[int, float]]
    """(token id, log-probability), most likely first, lower id first among equals; ``params.logprobs`` of them."""


@dataclass(slots=True)
class SequenceOutput:
    """What one step adds to one sequence."""

    request_id: str
    index: int
    """Which of the request's ``n`` sequences."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One for each of ``token_ids``; None unless asked for."""
    finish_reason: str | None = None
    """``stop``, ``length``, ``abort`` or ``error`` in the sequence's last output; None before."""
    stop_reason: int | str | None = None
    """The stop token id that ended it; the message where finish_reason is ``error``."""
    end_token: bool = True
    """Where finish_reason is ``stop``: the last token is the end-of-text or stop token that ended the sequence, and no part of the
    text. False where nothing could follow a complete text."""
    cached_tokens: int | None = None
    """In the first output: positions of the request's prompt that were found in the prefix cache."""
    queued_s: float | None = None
    """In the first output: how long the request waited before anything of it was computed."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """In the first output of the first sequence, where they were asked for: one for each token of the prompt behind the first."""
    vector: list[float] | None = None
    """The pooled hidden states of the prompt, where they were asked for. Not normalised."""
    preemptions: int | None = None
    """In the last output: how often sequences of the request were preempted."""

    @property
    def is_one_token(self) -> bool:
        """It says nothing but the next token of its sequence."""
        return (
            len(self.token_ids) == 1
            and self.finish_reason is None
            and self.logprobs is None
            and self.cached_tokens is None
            and self.queued_s is None
            and self.prompt_logprobs is None
            and self.vector is None
            and self.preemptions is None
        )
