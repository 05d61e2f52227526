"""BlockPool: every block of the KV pool, its reference count, and which block is handed out next.

    free   [ empty: no content ][ never used ][ idle: cached content, in the order in which it may go ]
             handed out first     then          last, and their content is forgotten

An empty block is handed out while its memory is still warm (a stack), and a pool that is larger than the load never
touches the rest of its memory. What the idle blocks hold, and which goes first, is the PrefixCache's knowledge.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from quire.core.prefix_cache import PrefixCache

EMPTY, OWNED, IDLE = 0, 1, 2
"""The states of a block, as bytes."""
_OWNED_OR_FREE = bytes((EMPTY, OWNED, EMPTY)) + bytes(253)
"""IDLE → EMPTY, for ``bytes.translate``."""


class BlockPool:
    """``num_blocks`` blocks, ids 0 to ``num_blocks - 1``. A block with ``ref_counts[id] == 0`` is free. ``clock``: seconds."""

    __slots__ = (
        "_clock", "_empty", "_fresh", "cache", "num_blocks", "num_owned", "num_references", "num_shared", "ref_counts", "since", "states",
    )  # fmt: skip

    def __init__(self, num_blocks: int, cache: PrefixCache, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.num_blocks = num_blocks
        self.cache = cache
        self.ref_counts = [0] * num_blocks
        self.num_owned = 0
        """Blocks with an owner."""
        self.num_references = 0
        """Sum of all reference counts: the blocks that there would be if nothing were shared."""
        self.num_shared = 0
        """Blocks with more than one owner."""
        self._empty: list[int] = []
        self._fresh = 0
        self._clock = clock
        self.states = bytearray(num_blocks)
        """EMPTY, OWNED or IDLE."""
        self.since = array("d", bytes(8 * num_blocks))
        """When a block got its first owner, or lost its last one."""

    @property
    def num_free(self) -> int:
        return self.num_blocks - self.num_owned

    @property
    def num_touched(self) -> int:
        """Blocks that were ever handed out: those with an id below it."""
        return self._fresh

    def take(self, count: int) -> list[int] | None:
        """``count`` blocks with one owner each, or None (and nothing changed) where fewer are free."""
        if count > self.num_blocks - self.num_owned:
            return None
        blocks, now = [], self._clock()
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            elif self._fresh < self.num_blocks:
                block = self._fresh
                self._fresh += 1
            else:
                block = self.cache.evict()
            self.ref_counts[block] = 1
            self.states[block] = OWNED
            self.since[block] = now
            blocks.append(block)
        self.num_owned += count
        self.num_references += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each block; an idle one is revived, with its content."""
        for block in blocks:
            count = self.ref_counts[block] = self.ref_counts[block] + 1
            self.num_references += 1
            if count == 2:
                self.num_shared += 1
            elif count == 1:
                self.num_owned += 1
                self.states[block] = OWNED
                self.since[block] = self._clock()
                self.cache.revive(block)

    def release(self, blocks: Iterable[int], left: bool = False) -> None:
        """Give up one ownership of each block. Those left without owner become idle (the first goes first) or empty. left: a window has
        left them behind."""
        now = self._clock()
        for block in blocks:
            count = self.ref_counts[block] = self.ref_counts[block] - 1
            self.num_references -= 1
            if count == 1:
                self.num_shared -= 1
            elif count == 0:
                self.num_owned -= 1
                self.since[block] = now
                if self.cache.retire(block, left):
                    self.states[block] = IDLE
                else:
                    self.states[block] = EMPTY
                    self._empty.append(block)

    def discard(self, block: int) -> None:
        """``block`` has just lost its content. If it was idle, it is empty now."""
        if self.ref_counts[block] == 0:
            self.states[block] = EMPTY
            self._empty.append(block)

    def largest_free_run(self) -> int:
        """Length of the longest run of free blocks with consecutive ids: all that a contiguous allocator could hand out at once."""
        return max(map(len, self.states.translate(_OWNED_OR_FREE).split(b"\x01")))

    def check(self) -> None:
        """Raises AssertionError unless the free blocks are exactly the empty, the never used and the idle ones."""
        empty, idle = set(self._empty), set(self.cache.idle())
        owned = {block for block, count in enumerate(self.ref_counts) if count}
        assert min(self.ref_counts, default=0) >= 0, "a block has fewer than no owners"
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert self._fresh <= self.num_blocks
        for one, other, both in (empty, idle, "empty and idle"), (empty, owned, "empty and owned"), (idle, owned, "idle and owned"):
            assert one.isdisjoint(other), f"blocks {sorted(one & other)} are both {both}"
        for blocks, what in (empty, "empty"), (idle, "idle"), (owned, "owned"):
            assert max(blocks, default=-1) < self._fresh, f"blocks are {what} that were never used"
        assert len(empty) + len(idle) + len(owned) == self._fresh, "a block is neither owned nor free"
        states = bytearray(self.num_blocks)
        for blocks, state in (owned, OWNED), (idle, IDLE):
            for block in blocks:
                states[block] = state
        assert self.states == states, "states differ from the owners and the free list"
        assert self.num_owned == len(owned)
        assert self.num_references == sum(self.ref_counts)
        assert self.num_shared == sum(self.ref_counts[block] > 1 for block in owned)
