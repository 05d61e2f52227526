"""What a lookup finds, against a search through everything that the blocks hold."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.test_sharing import ask, make, run
from quire.core.content import Node, decode
from quire.core.prefix_cache import PrefixCache

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def resident(cache: PrefixCache) -> list[tuple[int, ...]]:
    """All beginnings of prompts that the blocks hold without a gap, as far as they hold them."""
    held: list[tuple[int, ...]] = [()]
    todo: list[tuple[tuple[int, ...], Node]] = [((), cache.root(b""))]
    for tokens, node in todo:
        for child in node.children.values():
            if child.complete:
                held.append(tokens + decode(child.key))
                todo.append((held[-1], child))
    return held


def common(a: tuple[int, ...], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.integers(1, 6)), min_size=1, max_size=30), st.lists(TOKENS, min_size=1, max_size=8))
def test_a_lookup_finds_the_longest_beginning(before: list[tuple[list[int], int]], prompts: list[list[int]]) -> None:
    engine = make(8, 4, max_model_len=28)
    for i, (prompt, count) in enumerate(before):
        run(engine, ask(str(i), prompt, max_tokens=count))
    cache = engine.scheduler.manager.cache
    for prompt in prompts:
        assert cache.match(b"", prompt).num_positions == max(common(held, prompt) for held in resident(cache))


def test_what_was_evicted_does_not_hide_what_was_not() -> None:
    """Contents that are gone are remembered for a while, and begin as many prompts of one template do."""
    engine = make(16, 4)
    for i in range(24):
        run(engine, ask(str(i), [7, 7, i, 40, 41], max_tokens=1))
    (output,) = run(engine, ask("a", [7, 7], max_tokens=1))[("a", 0)]
    assert output.cached_tokens == 1
