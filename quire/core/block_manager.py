"""BlockManager: the only code that changes block tables and reference counts.

    logical   [ block 0 ][ block 1 ][ block 2 ]        one sequence's positions, block_size each
    physical     17         4          9               its BlockTable: anywhere in the pool
    tokens     ################ ########               num_computed positions written; the rest of block 2 is its empty tail

Blocks come on demand: a table always covers exactly the positions that are computed or planned, never more than one
partly filled block. The waste of a sequence is the empty part of its last block.
"""

from __future__ import annotations

from collections.abc import Iterable

from quire.core.block_pool import BlockPool
from quire.core.sequence import Sequence
from quire.core.stats import KVStats


class BlockManager:
    """Owns the pool. ``block_size`` positions to a block; see the module's drawing."""

    __slots__ = ("block_size", "pool")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold ``num_positions`` positions of one sequence."""
        return -(-num_positions // self.block_size)

    def grow(self, seq: Sequence, num_positions: int) -> list[int] | None:
        """Make ``seq``'s table cover ``num_positions`` positions.

        Returns the blocks appended (often none), or None, with nothing changed, where the pool has too few.
        """
        missing = self.blocks_for(num_positions) - len(seq.block_table)
        if missing <= 0:
            return []
        blocks = self.pool.take(missing)
        if blocks is not None:
            seq.block_table.extend(blocks)
        return blocks

    def free(self, seq: Sequence) -> None:
        """Give back every block of ``seq``. The one path that frees: finish, abort, preempt and error come here."""
        self.pool.release(seq.block_table)
        seq.block_table.clear()
        seq.num_computed = 0

    def stats(self, running: Iterable[Sequence]) -> KVStats:
        """Counts of the pool; ``running`` are the sequences that own blocks."""
        return KVStats(self.pool.num_blocks, self.block_size, self.pool.num_free, sum(s.num_computed for s in running))

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove the counts against the tables of all live sequences. Raises AssertionError."""
        self.pool.check()
        owners = [0] * self.pool.num_blocks
        for seq in sequences:
            held = len(seq.block_table)
            assert held >= self.blocks_for(seq.num_computed), f"{held} blocks hold {seq.num_computed} computed positions"
            assert held <= self.blocks_for(seq.num_tokens), f"{held} blocks for {seq.num_tokens} tokens"
            for block in seq.block_table:
                owners[block] += 1
        assert owners == self.pool.ref_counts, "reference counts differ from the tables' owners"
