"""Stop strings: found across token boundaries, and never shown by half.

The text ends at the first character with which any stop string is complete; where several are complete at the same
character, the longest counts. So the outcome depends on the text alone, not on how it is cut into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Matcher:
    """Knuth, Morris, Pratt (1977): a stop string found in one pass over the text."""

    stop: str
    fallback: list[int]
    """For each length n ≥ 1: the length of the longest proper prefix of stop that is a suffix of its first n characters."""
    matched: int = 0
    """Length of the longest prefix of stop that is a suffix of the text so far; below len(stop)."""

    @staticmethod
    def of(stop: str) -> _Matcher:
        fallback, k = [0, 0], 0
        for char in stop[1:]:
            while k and stop[k] != char:
                k = fallback[k]
            k += stop[k] == char
            fallback.append(k)
        return _Matcher(stop, fallback)

    def push(self, char: str) -> bool:
        """Whether stop is complete with ``char``."""
        k, stop = self.matched, self.stop
        while k and stop[k] != char:
            k = self.fallback[k]
        k += stop[k] == char
        done = k == len(stop)
        self.matched = self.fallback[k] if done else k
        return done


class StopChecker:
    """Watches one sequence's text for its stop strings.

    Holds back the longest end of the text that could become a stop string, nothing more. Costs a constant for each
    character and stop string, amortised.
    """

    __slots__ = ("_first", "_held", "_include", "_matchers", "matched")

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """include: the stop string that is found stays in the text."""
        self._matchers = [_Matcher.of(stop) for stop in dict.fromkeys(stops)]
        self._first = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing is emitted after it."""

    def push(self, text: str, allowed: bool = True) -> str:
        """The text that may be shown now. Not ``allowed``: a stop string that is complete within ``text`` does not count."""
        if self.matched is not None:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text
        whole = self._held + text
        for i, char in enumerate(text, start=len(self._held) + 1):
            done = [m.stop for m in self._matchers if m.push(char)]
            if done and allowed:
                self.matched = max(done, key=len)
                self._held = ""
                return whole[: i if self._include else i - len(self.matched)]
        keep = len(whole) - max((m.matched for m in self._matchers), default=0)
        self._held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held
