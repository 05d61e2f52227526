"""Constraint: which tokens may come next in one sequence, under a form, a list of allowed tokens and a list of banned words.

Implements the protocols of quire.core.constraint. Its state is a function of what it was made with and of the tokens that it was
told of. Forced tokens are the one thing that needs care for that: how llguidance cuts the rest of a forced text may depend on
where it is asked, so it is asked after a token that was chosen, and what it said then stands until all of it has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from quire.errors import EngineError
from quire.grammar.masks import Masks
from quire.grammar.program import reason
from quire.grammar.watch import timed

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Constraint:
    """One sequence's. ``matcher`` is its own; ``allowed`` and ``bad_words``, as token ids, may be shared."""

    __slots__ = ("_allowed", "_bad_words", "_ignore_eos", "_made", "_masks", "_matcher", "complete", "forced", "mask")

    def __init__(
        self,
        masks: Masks,
        matcher: LLMatcher | None,
        allowed: bytes | None,
        bad_words: Sequence[Sequence[int]],
        made: Sequence[int],
        *,
        ignore_eos: bool = False,
    ) -> None:
        """After ``made`` tokens. Raises EngineError where the form does not allow them."""
        self._masks = masks
        self._matcher = matcher
        self._allowed = allowed
        self._bad_words = bad_words
        self._ignore_eos = ignore_eos
        self._made = list(made) if bad_words else []
        self.mask: bytes | None = None
        self.forced: list[int] = []
        self.complete = False
        self._force()
        self.advance(made)

    def advance(self, tokens: Sequence[int]) -> None:
        """See quire.core.constraint.Constraint."""
        if self._bad_words:
            self._made += tokens
        if self._matcher is not None:
            for token in tokens:
                self._consume(self._matcher, token)
        self._look()

    def foresee(self, tokens: Sequence[int]) -> list[bytes | None]:
        """See quire.core.constraint.Constraint."""
        ahead = copy(self)
        ahead.forced, ahead._made = list(self.forced), list(self._made)
        if self._matcher is not None:
            ahead._matcher = self._matcher.deep_copy()
        masks = [ahead.mask]
        for token in tokens:
            if ahead.mask is not None and not ahead.mask[token >> 3] >> (token & 7) & 1:
                break
            try:
                ahead.advance([token])
            except EngineError:  # the sequence finds out by itself, if it comes there
                break
            if ahead.complete:
                break
            masks.append(ahead.mask)
        return masks

    def _consume(self, matcher: LLMatcher, token: int) -> None:
        if not timed(matcher.consume_token, token):
            raise self._lost(matcher)
        if self.forced:
            del self.forced[0]
        if not self.forced:
            self._force()

    def _force(self) -> None:
        """Ask for what must follow. Nothing is taken as forced where it may be banned."""
        if self._matcher is not None and self._allowed is None and not self._bad_words and not self._matcher.is_stopped():
            self.forced = timed(self._matcher.compute_ff_tokens)

    def _look(self) -> None:
        """What may come next."""
        matcher, masks = self._matcher, self._masks
        if self.forced:
            self.mask = masks.of(self.forced[:1])
            return
        mask = self._allowed
        if matcher is not None:
            if matcher.is_stopped():
                if matcher.is_error():
                    raise self._lost(matcher)
                self.complete = True
                return
            found = timed(matcher.compute_bitmask)[: masks.num_bytes]
            if matcher.is_error():
                raise self._lost(matcher)
            going_on = masks.going_on(found)
            if going_on is None:
                if not matcher.is_accepting():
                    raise EngineError("the structured output can't be followed any further: the model has no tokens for what comes next")
                self.complete = True
                return
            if self._ignore_eos or not masks.can_end:
                found = going_on
            mask = found if mask is None else masks.both(found, mask)
        banned = [word[-1] for word in self._bad_words if self._stands_before(word)]
        self.mask = masks.without(mask, banned) if banned else mask

    def _stands_before(self, word: Sequence[int]) -> bool:
        """All of ``word`` but its last token is there."""
        count = len(word) - 1
        return count == 0 or (len(self._made) >= count and self._made[-count:] == list(word[:-1]))

    def _lost(self, matcher: LLMatcher) -> EngineError:
        return EngineError(f"the structured output can't be followed any further: {reason(matcher)}; a simpler form may help")
