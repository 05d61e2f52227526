"""EvictionOrder: which idle block goes next, when memory is needed.

    left     [ what windows have left behind, not found again either ]  goes before anything else
    new      [ never found again; the first one goes next            ]
    proven   [ found again since it was computed; at most a share    ]  what is too much goes to the end of ``new``
    ghosts   [ evicted lately: its tokens, without its block         ]  computed again, the content counts as proven

Least recently used alone lets one flood of long prompts, each seen once, wash away what everybody uses. So content that
was found again is kept apart from content that was not yet (SLRU: Karedla, Love, Wherry, "Caching strategies to improve disk
system performance", 1994), and what comes back soon after it went counts as found (the ghosts of 2Q and ARC). Sequences give
their blocks back end first, so leaves go before what they continue.

The share is small: it has to hold the common beginnings, not the working set. On a conversation trace with pools of 3,000,
10,000 and 50,000 blocks, 0.28 to 0.32 beat plain LRU at each of them; with 0.5 the largest pool loses. See
docs/benchmarks/memory.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from quire.core.content import Node

PROVEN_SHARE = 0.3
"""Of the pool, at most: idle blocks whose content was found again."""
GHOST_SHARE = 1.0
"""Ghosts that are remembered, for each block of the pool."""


class EvictionOrder:
    """The idle blocks (content, but no owner) of a pool of ``num_blocks``. Every operation takes constant time, but for passing over what
    is retained."""

    __slots__ = ("_ghosts", "_left", "_most_ghosts", "_most_proven", "_new", "_proven")

    def __init__(self, num_blocks: int) -> None:
        self._left: OrderedDict[int, Node] = OrderedDict()
        self._new: OrderedDict[int, Node] = OrderedDict()
        self._proven: OrderedDict[int, Node] = OrderedDict()
        self._ghosts: OrderedDict[int, Node] = OrderedDict()
        self._most_proven = int(num_blocks * PROVEN_SHARE)
        self._most_ghosts = int(num_blocks * GHOST_SHARE)

    def __len__(self) -> int:
        return len(self._left) + len(self._new) + len(self._proven)

    def __iter__(self) -> Iterator[int]:
        """The idle blocks."""
        yield from self._left
        yield from self._new
        yield from self._proven

    def retire(self, node: Node, block: int, left: bool = False) -> None:
        """``block``, which holds ``node``'s content, has lost its last owner; left: a window has left it behind, while what it belongs to
        goes on. Few prompts part from another just where they would need it."""
        if not node.proven:
            (self._left if left and not node.priority else self._new)[block] = node
            return
        self._proven[block] = node
        if len(self._proven) > self._most_proven:
            oldest_block, oldest = self._proven.popitem(last=False)
            oldest.proven = False
            self._new[oldest_block] = oldest

    def revive(self, block: int) -> None:
        """An idle block has an owner again."""
        for queue in (self._new, self._proven, self._left):
            if queue.pop(block, None) is not None:
                return
        raise KeyError(block)

    def evict(self, now: float) -> tuple[int, Node]:
        """The block whose turn it is, which goes, and its content. Retained content is passed over, and its retention decays: it costs at
        most log2(priority) + 1 turns for each block, however they are spread over the evictions."""
        queue = self._left or self._new or self._proven
        for _ in range(len(queue)):
            block, node = next(iter(queue.items()))
            if node.priority == 0 or node.until <= now:
                break
            node.priority //= 2
            queue.move_to_end(block)
        return queue.popitem(last=False)

    def remember(self, ghost: Node) -> Node | None:
        """A block of ``ghost``'s is gone. Returns the ghost that is forgotten for it, if any."""
        if not self._most_ghosts or ghost.remembered:
            return None
        ghost.remembered = True
        self._ghosts[ghost.number] = ghost
        if len(self._ghosts) <= self._most_ghosts:
            return None
        _, oldest = self._ghosts.popitem(last=False)
        oldest.remembered = False
        return oldest

    def returned(self, node: Node) -> None:
        """The tokens of a ghost that is remembered were computed again: it was worth keeping."""
        del self._ghosts[node.number]
        node.remembered = False
        node.proven = True

    def clear(self) -> None:
        for ghost in self._ghosts.values():
            ghost.remembered = False
        self._left.clear()
        self._new.clear()
        self._proven.clear()
        self._ghosts.clear()
