"""Constraints: which tokens may come next in a sequence. Here is what the engine knows of them; quire.grammar makes them.

    sampled   t              the sampler chooses it, under the mask
    forced      f1 f2 f3     nothing else may follow: known without being sampled, computed together with t in the next step
    sampled              t'  under the next mask

Tokens that are forced are part of the sequence as any others. Where log-probabilities are asked for they are sampled one by one,
each under a mask that allows it alone: the same tokens, and their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.structured import Structured

if TYPE_CHECKING:
    from quire.core.sequence import Sequence


class Constraint(Protocol):
    """Follows one sequence. A function of its parameters and of the tokens that the sequence has generated, and of nothing else:
    made anew with the same tokens it goes on as before."""

    @property
    def mask(self) -> bytes | None:
        """The tokens that may come next, a bit each: bit t % 8 of byte t // 8, a multiple of 4 bytes. None: all."""

    @property
    def forced(self) -> Seq[int]:
        """The next tokens, as far as there is no choice; of these the mask allows the first alone."""

    @property
    def complete(self) -> bool:
        """Nothing may follow: the sequence ends, without an end-of-text token. The mask means nothing then."""

    def foresee(self, tokens: Seq[int]) -> list[bytes | None]:
        """The masks after none, one, two ... of ``tokens``, as far as these are allowed and something may follow. Changes nothing."""

    def advance(self, tokens: Seq[int]) -> None:
        """The sequence has grown by ``tokens``. Raises QuireError where it can't be followed any further."""


class Constraints(Protocol):
    """Makes constraints."""

    def prepare(self, structured: Structured | None) -> None:
        """Do ahead what takes time for it; may be called on another thread than ``open``. Raises QuireError."""

    def open(self, params: SamplingParams, made: Seq[int]) -> Constraint:
        """For a sequence that has generated ``made``. Raises QuireError."""


def follow(seq: Sequence, output: SequenceOutput) -> tuple[str, int | None] | None:
    """``seq`` and ``output`` have the tokens of a step; they get those that are forced by them. Returns (finish_reason, stop_reason)
    if that ends the sequence. Raises QuireError, see Constraint."""
    constraint = seq.constraint
    assert constraint is not None
    new = list(output.token_ids)
    while True:
        end = seq.end_reason()
        if end is not None and end[0] == "stop":
            return end
        constraint.advance(new)
        if constraint.complete:  # at the limit of its length too: there is nothing missing
            output.end_token = False
            return "stop", None
        if end is not None or seq.params.logprobs is not None or not constraint.forced:
            return end
        new = []
        for token in constraint.forced:
            seq.tokens.append(token)
            new.append(token)
            if seq.end_reason() is not None:
                break
        seq.unsent += new
        output.token_ids += new
