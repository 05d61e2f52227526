"""What the tables of sequences and the counts of the pool come to: counted, and proved against each other. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quire.core.sequence import Sequence
from quire.core.stats import KVStats

if TYPE_CHECKING:
    from quire.core.block_manager import BlockManager


def stats(manager: BlockManager, running: Iterable[Sequence]) -> KVStats:
    """Counts of the pool; ``running`` are the sequences that own blocks."""
    size, width = manager.block_size, manager.width
    last: dict[int, tuple[int, int]] = {}  # last block of tables → positions filled, tables that end with it
    for seq in running:
        filled = seq.num_computed - (len(seq.block_table) // width - 1) * size
        for block in seq.block_table[-width:]:
            if block >= 0:
                fill, tables = last.get(block, (0, 0))
                last[block] = max(fill, filled), tables + 1
    counts = manager.pool.ref_counts
    # Where a table goes on behind the block, the block is full.
    empty = sum(size - fill for block, (fill, tables) in last.items() if tables == counts[block])
    pool, counters = manager.pool, manager.counters
    return KVStats(
        num_blocks=pool.num_blocks,
        block_size=size,
        free_blocks=pool.num_free,
        cached_blocks=manager.cache.num_idle,
        shared_blocks=pool.num_shared,
        saved_blocks=pool.num_references - pool.num_owned,
        positions_used=pool.num_owned * size - empty,
        largest_free_run=pool.largest_free_run(),
        host_blocks=manager.swap_pool.num_blocks,
        host_blocks_used=manager.swap_pool.num_used,
        groups=manager.width,
        counters=counters.copy(),
    )


def check(manager: BlockManager, sequences: Iterable[Sequence]) -> None:
    """Prove the counts against the tables of all live sequences. Raises AssertionError."""
    manager.pool.check()
    manager.cache.check()
    owners = [0] * manager.pool.num_blocks
    writers: dict[int, Sequence] = {}
    users: dict[int, int] = {}
    held: list[int] = []
    full, width = manager.groups.full, manager.width
    for seq in sequences:
        table = seq.block_table
        have, part = divmod(len(table), width)
        assert not part, "a group lacks a block"
        assert have >= manager.blocks_for(seq.num_computed), f"{have} blocks hold {seq.num_computed} computed positions"
        tokens = seq.num_tokens + seq.in_flight
        assert have <= manager.blocks_for(tokens), f"{have} blocks for {tokens} tokens"
        assert all((block < 0) == (i % width >= full and i // width < seq.num_trimmed) for i, block in enumerate(table)), (
            "a hole in a block table"
        )
        own = [block for block in table if block >= 0]
        assert len(set(own)) == len(own), "a block is twice in a table"
        for block in own:
            owners[block] += 1
        if not seq.shared_tail and seq.num_computed < have * manager.block_size:
            for block in table[-width:]:
                assert block not in writers, f"block {block} has two writers"
                writers[block] = seq
        if seq.node is not None:
            users[id(seq.node)] = users.get(id(seq.node), 0) + 1
            assert seq.node.users >= users[id(seq.node)]
        manager.cache.check_holds(seq.tokens, table, seq.num_computed)
        held += [block for block in seq.host_blocks or () if block >= 0]
        assert not (table and seq.host_blocks), "a sequence is both in the pool and in the swap pool"
    assert owners == manager.pool.ref_counts, "reference counts differ from the tables' owners"
    for block in writers:
        assert owners[block] == 1, f"block {block} is written by one of {owners[block]} owners"
    manager.swap_pool.check(held)
