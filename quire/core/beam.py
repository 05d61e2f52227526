"""Beam search: which sequences live on, which are hypotheses, and when to stop. Pure: log-probabilities in, moves out.

A search keeps ``width`` live beams and the ``width`` best finished hypotheses. One step:

    candidates   every live beam times its most likely tokens, ranked by the sum of their log-probabilities
       ├─ end with a stop token (all of them, at the length limit)  → hypotheses, if among the ``width`` best candidates
       └─ the ``width`` best others                                 → the next live beams

A hypothesis is ranked by sum / length**length_penalty, the length being that of the generated tokens, the stop token
included. The results are those of transformers' ``generate(num_beams=width, do_sample=False)`` (5.23, ``_beam_search``;
https://huggingface.co/docs/transformers/main_classes/text_generation), token for token. The length penalty of Wu et al.
2016, ((5 + length) / 6)**alpha, is another one. Three things are Quire's own:

- Sums are double precision where transformers' are float32.
- Ties are broken, where torch.topk leaves them open: among candidates the better beam goes first, then the one that the
  caller named first; among hypotheses the older.
- A token of probability zero (-inf, or NaN) is never chosen. Where so few continuations exist that ``width`` beams can't
  live, fewer do, and there may be fewer hypotheses than asked for; transformers fills up with placeholders.

The caller owns the sequences, and forks them by the moves; here a beam is one node that points to its parent, so a step
costs the same at every length, and what no beam descends from is forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Literal

EarlyStopping = bool | Literal["never"]


@dataclass(slots=True, frozen=True)
class Move:
    """One live beam of the next step: the beam ``parent`` of this step, continued by ``token``."""

    parent: int
    token: int


@dataclass(slots=True, frozen=True)
class Hypothesis:
    """A finished sequence."""

    token_ids: list[int]
    """Generated tokens, the stop token included."""
    logprobs: list[float]
    """Log-probability of each token, as the caller gave it."""
    cumulative_logprob: float
    """Their sum."""
    score: float
    """cumulative_logprob / len(token_ids)**length_penalty: what hypotheses are ranked by."""
    finish_reason: str
    """``stop`` or ``length``."""
    stop_reason: int | None
    """The stop token id that ended it; None for the end-of-text token and for ``length``."""


@dataclass(slots=True, frozen=True, eq=False)
class _Node:
    """The last token of a beam or of a hypothesis; the tokens before it are reached through ``parent``."""

    parent: _Node | None = field(repr=False)
    token: int
    logprob: float
    total: float
    """Sum of the log-probabilities from the first generated token to this one."""


class BeamSearch:
    """One search. ``advance`` until it returns no moves, then ``hypotheses``.

    ``early_stopping`` says when to stop once ``width`` hypotheses are there (and no sooner):

    - True: at once.
    - False: when the best live beam, scored at its present length, is no better than the worst hypothesis. A guess where
      length_penalty > 0, for a longer sequence may score higher.
    - "never": when it could not be better at any length, were every further token certain: it is scored at
      ``max_tokens`` where length_penalty > 0, else as for False.

    A search of width 1 is greedy, and stops at its first stop token whatever ``early_stopping`` says. The parameters are
    validated by the caller: 1 <= num_return <= width, max_tokens >= 1, max_tokens**abs(length_penalty) a finite double.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        eos_token_ids: Sequence[int] = (),
        *,
        stop_token_ids: Sequence[int] = (),
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        num_return: int = 1,
    ) -> None:
        """``eos_token_ids`` is empty where the end of text is ignored; ``stop_token_ids`` are reported as stop_reason."""
        assert 1 <= num_return <= width, f"{num_return} hypotheses of {width} beams"
        assert max_tokens >= 1
        self.width = width
        self.max_tokens = max_tokens
        self.length_penalty = length_penalty
        self.num_return = num_return
        self._early_stopping: EarlyStopping = early_stopping if width > 1 else True
        self._stop_ids = frozenset(stop_token_ids)
        self._end_ids = self._stop_ids.union(eos_token_ids)
        self._length = 0
        self._live = [_Node(None, -1, 0.0, 0.0)]
        """Best first. At the start, the prompt."""
        self._finished: list[tuple[float, _Node]] = []
        """(score, last token), best first, ``width`` at most."""

    @property
    def num_candidates(self) -> int:
        """Tokens that ``advance`` needs of each live beam.

        At most ``width`` candidates live on, and less likely ones can precede them only by ending: one for each token
        that ends. transformers ranks max(2, 1 + ends) * width candidates of all beams together, to the same effect.
        """
        return self.width + len(self._end_ids)

    @property
    def num_live(self) -> int:
        """Beams that the next ``advance`` continues: 1 at the start, then ``width``, 0 when the search has ended."""
        return len(self._live)

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[Move]:
        """Take one more token: the next live beams, best first, or none where the search has ended.

        ``candidates[i]``: the ``num_candidates`` most likely (token id, log-probability) of live beam ``i``, most likely
        first (fewer where the vocabulary is smaller). Live beam ``i`` of the next call is this call's beam
        ``moves[i].parent`` with ``moves[i].token`` appended.
        """
        assert self._live, "the search has ended"
        assert len(candidates) == len(self._live), f"candidates of {len(candidates)} beams, {len(self._live)} live"
        self._length += 1
        ranked = [
            (node.total + logprob, beam, token, logprob)
            for beam, (node, row) in enumerate(zip(self._live, candidates, strict=True))
            for token, logprob in row
            if logprob > -math.inf
        ]
        ranked.sort(key=itemgetter(0), reverse=True)  # stable
        moves: list[Move] = []
        live: list[_Node] = []
        at_limit = self._length == self.max_tokens
        for rank, (total, beam, token, logprob) in enumerate(ranked):
            if at_limit or token in self._end_ids:
                if rank < self.width:
                    node = _Node(self._live[beam], token, logprob, total)
                    self._finished.append((self._score(total, self._length), node))
            elif len(live) < self.width:
                live.append(_Node(self._live[beam], token, logprob, total))
                moves.append(Move(beam, token))
        self._finished.sort(key=itemgetter(0), reverse=True)
        del self._finished[self.width :]
        if live and self._may_improve(live[0]):
            self._live = live
            return moves
        self._live = []
        return []

    def hypotheses(self) -> list[Hypothesis]:
        """The ``num_return`` best of what has finished, best first."""
        return [self._hypothesis(score, node) for score, node in self._finished[: self.num_return]]

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self.length_penalty)

    def _may_improve(self, best: _Node) -> bool:
        """Whether the search goes on from live beams of which ``best`` is the best."""
        if len(self._finished) < self.width:
            return True
        if self._early_stopping is True:
            return False
        to_the_end = self._early_stopping == "never" and self.length_penalty > 0
        worst_kept, _ = self._finished[-1]
        return self._score(best.total, self.max_tokens if to_the_end else self._length) > worst_kept

    def _hypothesis(self, score: float, last: _Node) -> Hypothesis:
        tokens: list[int] = []
        logprobs: list[float] = []
        node = last
        while node.parent is not None:  # the root stands for the prompt
            tokens.append(node.token)
            logprobs.append(node.logprob)
            node = node.parent
        stopped = last.token in self._end_ids
        stop_reason = last.token if last.token in self._stop_ids else None
        return Hypothesis(tokens[::-1], logprobs[::-1], last.total, score, "stop" if stopped else "length", stop_reason)
