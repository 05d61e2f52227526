"""Stop strings against a naive search, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.text.stop import StopChecker

small = st.text("ab🙂", max_size=30)
stop_lists = st.lists(st.text("ab🙂", min_size=1, max_size=5), max_size=4).map(tuple)


def naive(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(end of the match, stop string): the first character that completes a stop string, and the longest of those."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return end, max(done, key=len)
    return None


def longest_beginning(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of text that a stop string could begin with."""
    return max((n for stop in stops for n in range(min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)


@given(st.lists(small, max_size=12), stop_lists, st.booleans())
def test_against_naive_search(pieces: list[str], stops: tuple[str, ...], include: bool) -> None:
    checker, text, shown = StopChecker(stops, include), "", ""
    for piece in pieces:
        text += piece
        shown += checker.push(piece)
        found = naive(text, stops)
        if found is not None:
            assert checker.matched == found[1]
            assert shown == text[: found[0] if include else found[0] - len(found[1])]
            assert checker.push("more") == checker.flush() == ""
            return
        assert checker.matched is None
        assert shown == text[: len(text) - longest_beginning(text, stops)], "nothing is held back that can be shown"
    assert shown + checker.flush() == text


@given(st.lists(st.tuples(small, st.booleans()), max_size=12), stop_lists)
def test_matches_that_do_not_count_yet(pieces: list[tuple[str, bool]], stops: tuple[str, ...]) -> None:
    checker, text, shown = StopChecker(stops), "", ""
    for piece, allowed in pieces:
        start, text = len(text), text + piece
        shown += checker.push(piece, allowed)
        ends = [end for end in range(start + 1, len(text) + 1) if any(text[:end].endswith(s) for s in stops)] if allowed else []
        if ends:
            assert checker.matched is not None
            assert shown == text[: ends[0] - len(checker.matched)][: len(shown)]
            return
        assert checker.matched is None
        assert text.startswith(shown)
    assert shown + checker.flush() == text


def test_no_stop_strings() -> None:
    checker = StopChecker(())
    assert checker.push("anything") == "anything"
    assert checker.flush() == ""
