"""BlockPool: every block of the KV pool, its reference count, and the free list.

The free list is a stack: the block freed last is handed out first, while its memory is still warm, and a pool that is
larger than the load never touches the rest of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """``num_blocks`` blocks, ids 0 to ``num_blocks - 1``. A block with ``ref_counts[id] == 0`` is free."""

    __slots__ = ("_free", "num_blocks", "ref_counts")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """``count`` blocks with one owner each, or None (and nothing changed) where fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each block; those without owner become free, the first of ``blocks`` reused first."""
        freed = []
        for block in blocks:
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                freed.append(block)
        self._free.extend(reversed(freed))

    def check(self) -> None:
        """Raises AssertionError unless the free list is exactly the blocks without owner."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        for block, count in enumerate(self.ref_counts):
            assert count >= 0, f"block {block} has {count} owners"
            assert (count == 0) == (block in free), f"block {block}: {count} owners, in free list: {block in free}"
