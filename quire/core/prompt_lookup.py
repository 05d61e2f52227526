"""Prompt lookup: where did the newest tokens stand before, and what came after them?

Text that repeats itself, or its prompt (edit this file, answer from this document, fill in this form), is guessed by looking it
up: the longest stretch of tokens that ends the sequence and stands in it a second time, and what follows it there.

    tokens   ... [ d e f ] g h i ...  [ d e f ]
                          └ the draft: g h i       ▲ the next token
"""

from __future__ import annotations

from array import array

PAIR = 2
"""The shortest match. One token alone says too little about the next."""
LONGEST_MATCH = 16
"""Matches are not followed further back: they are as good as certain by then."""
MAX_CANDIDATES = 8
"""Earlier places of the newest pair that are compared, the latest first."""


class PromptLookup:
    """Finds earlier occurrences of the end of ``tokens``, a list that only grows.

    An index of the pairs of tokens: constant time for each token, once, and about 130 bytes, a small part of what the token's
    KV takes. It is brought up to date by ``find``, so that it costs nothing while nobody asks.
    """

    __slots__ = ("_before", "_last", "_tokens")

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._last: dict[int, int] = {}
        """Pair → where its second token stood last."""
        self._before = array("i", [-1])
        """For each position: where the pair that ends there stood the time before; -1 for nowhere."""

    def find(self) -> tuple[int, int]:
        """(position after the match, tokens in common) of the longest match, the latest among equals; (0, 0) for none."""
        tokens = self._tokens
        end = len(tokens) - 1
        if end < PAIR:
            return 0, 0
        self._extend(end)
        at = self._last.get(tokens[end - 1] << 32 | tokens[end], -1)
        best, longest = -1, 0
        for _ in range(MAX_CANDIDATES):
            if at < 0 or longest == LONGEST_MATCH:
                break
            common = PAIR
            while common < LONGEST_MATCH and common <= at and tokens[at - common] == tokens[end - common]:
                common += 1
            if common > longest:
                best, longest = at, common
            at = self._before[at]
        return best + 1, longest

    def draft(self, start: int, count: int) -> list[int]:
        """``count`` tokens from position ``start`` on. Where the sequence ends before, what it repeats goes on."""
        tokens = self._tokens
        period = len(tokens) - start
        draft = tokens[start : start + count]
        while len(draft) < count:
            draft.append(draft[-period])
        return draft

    def _extend(self, end: int) -> None:
        """Index the pairs that end before position ``end``: what follows them is known."""
        tokens, last, before = self._tokens, self._last, self._before
        for i in range(len(before), end):
            pair = tokens[i - 1] << 32 | tokens[i]
            before.append(last.get(pair, -1))
            last[pair] = i
