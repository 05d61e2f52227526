"""SwapPool: which blocks of the swap pool are free. Their ids follow those of the KV pool, so that a copy names both in the same way."""

from __future__ import annotations

from collections.abc import Iterable


class SwapPool:
    """``num_blocks`` blocks, the first of which has the id ``first``."""

    __slots__ = ("_free", "num_blocks")

    def __init__(self, first: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(first + num_blocks - 1, first - 1, -1))

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, table: list[int]) -> list[int] | None:
        """A place for each block of a table, and -1 where it has none. None, with nothing changed, where too few are free."""
        if len(table) - table.count(-1) > len(self._free):
            return None
        return [self._free.pop() if block >= 0 else -1 for block in table]

    def give(self, places: Iterable[int]) -> None:
        """Places that ``take`` gave are free again."""
        self._free.extend(place for place in places if place >= 0)

    def check(self, held: list[int]) -> None:
        """Raises AssertionError unless what is neither free nor ``held`` is nothing."""
        places = held + self._free
        assert len(places) == len(set(places)) == self.num_blocks, "a block of the swap pool is lost, or has two owners"
