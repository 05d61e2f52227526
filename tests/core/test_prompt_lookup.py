"""The index of earlier occurrences, against a plain search."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.prompt_lookup import LONGEST_MATCH, MAX_CANDIDATES, PAIR, PromptLookup


def plain_find(tokens: list[int]) -> tuple[int, int]:
    """The same answer without an index."""
    places = [at for at in range(1, len(tokens) - 1) if tokens[at - 1 : at + 1] == tokens[-2:]]
    best = (0, 0)
    for at in reversed(places[-MAX_CANDIDATES:]):
        common = PAIR
        while common < LONGEST_MATCH and common <= at and tokens[at - common] == tokens[-1 - common]:
            common += 1
        if common > best[1]:
            best = at + 1, common
    return best


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(1, 7), min_size=1, max_size=20),
)
@settings(max_examples=300, deadline=None)
def test_find_is_what_a_plain_search_finds_however_the_tokens_came(tokens: list[int], pieces: list[int]) -> None:
    seen: list[int] = []
    lookup = PromptLookup(seen)
    rest = list(tokens)
    for size in [*pieces, len(tokens)]:
        seen += rest[:size]
        rest = rest[size:]
        assert lookup.find() == plain_find(seen)


def test_the_longest_match_wins_and_the_latest_among_equals() -> None:
    tokens = [1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3, 60, 7, 2, 3, 70, 1, 2, 3]
    lookup = PromptLookup(tokens)
    start, common = lookup.find()
    assert (start, common) == (11, 3)
    assert lookup.draft(start, 3) == [60, 7, 2]


def test_tokens_that_never_stood_together_are_not_found() -> None:
    for tokens in ([], [1], [1, 1], [1, 2, 3], [2, 3, 1, 2, 4, 3, 2]):
        assert PromptLookup(tokens).find() == (0, 0)
    assert PromptLookup([1, 1, 1]).find() == (2, 2)


def test_a_draft_goes_on_with_what_repeats() -> None:
    tokens = [8, 1, 2, 3, 1, 2, 3, 1]
    lookup = PromptLookup(tokens)
    start, common = lookup.find()
    assert (start, common) == (5, 4)
    assert lookup.draft(start, 8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_matches_are_followed_only_so_far() -> None:
    tokens = list(range(100)) * 2
    assert PromptLookup(tokens).find() == (100, LONGEST_MATCH)
