"""BlockManager: the only code that changes block tables and reference counts.

    logical   [ block 0 ][ block 1 ][ block 2 ]        one sequence's positions, block_size each
    physical     17         4          9               its BlockTable: anywhere in the pool
    tokens     ################ ########               num_computed positions written; the rest of block 2 is its empty tail

Blocks come on demand: a table always covers exactly the positions that are computed or planned, never more than one
partly filled block. The waste of a sequence is the empty part of its last block.

Sharing: whole blocks of a cached prefix, and all blocks of a fork, the partly filled last one too. Nobody writes a block
with several owners: whoever has to gets a copy first. So there is one rule for samples, beams and late siblings.

Copies (on write, of a cached block that matches only in part, to and from the swap pool) are noted here in the order in
which they have to be done, before any write of the step; a block may be handed out again as soon as its copy is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quire.core.block_pool import BlockPool
from quire.core.content import Node
from quire.core.events import BlockCopied, BlockShared, Listener
from quire.core.prefix_cache import NOTHING, Match, PrefixCache
from quire.core.sequence import Sequence
from quire.core.stats import KVCounters, KVStats

NEVER = 1 << 62


class BlockManager:
    """Owns the pool. ``block_size`` positions to a block; see the module's drawing.

    caching: publish what is computed, and find it. window: positions that a query sees in every layer, 0 for all: blocks
    before it are given back. num_host_blocks: size of the swap pool; its ids follow those of the pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool = True,
        window: int = 0,
        num_host_blocks: int = 0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.block_size = block_size
        self.caching = caching
        self.num_host_blocks = num_host_blocks
        self.cache = PrefixCache(num_blocks, block_size, window, clock)
        self.pool = BlockPool(num_blocks, self.cache, clock)
        self.counters = KVCounters()
        self._host_free = list(range(num_blocks + num_host_blocks - 1, num_blocks - 1, -1))
        self._copies: list[tuple[int, int]] = []
        self._listener: Listener | None = None

    def listen(self, listener: Listener | None) -> None:
        """Tell ``listener`` every event of the blocks from now on."""
        self._listener = self.cache.listener = listener

    # Queries.

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold ``num_positions`` positions of one sequence."""
        return -(-num_positions // self.block_size)

    def match(self, seq: Sequence) -> Match:
        """What the cache holds of ``seq``'s tokens."""
        if not self.caching:
            return NOTHING
        tokens = seq.tokens if seq.findable >= len(seq.tokens) else seq.tokens[: seq.findable]
        match = self.cache.match(seq.request.salt, tokens)
        if seq.host_blocks is None:
            return match
        if len(match.blocks) < seq.host_blocks.count(-1):
            return NOTHING  # there would be a hole between what is found and what was swapped out
        return Match(match.node, match.blocks, None, len(match.blocks) * self.block_size)

    def need(self, seq: Sequence, match: Match) -> int:
        """Free blocks that ``seq`` takes until all its known tokens are computed, if it starts with ``match``."""
        counts = self.pool.ref_counts
        revived = sum(block >= 0 and counts[block] == 0 for block in match.blocks)
        return self.blocks_for(seq.num_tokens) - len(match.blocks) + revived

    def shared(self, match: Match) -> int:
        """Blocks of ``match`` that have an owner already, or that the window has left behind: they cost nothing."""
        counts = self.pool.ref_counts
        return sum(block < 0 or counts[block] > 0 for block in match.blocks)

    def need_fork(self, seq: Sequence) -> int:
        """Free blocks that ``seq`` takes until all its known tokens are computed, if it starts as a fork at the end of its prompt;
        one is for the copy of the partly filled block."""
        return self.blocks_for(seq.num_tokens) - self.blocks_for(seq.num_prompt) + (seq.num_prompt % self.block_size > 0)

    def lacking(self, seq: Sequence) -> int:
        """Free blocks that a running ``seq`` takes until all its known tokens are computed."""
        return self.blocks_for(seq.num_tokens) - len(seq.block_table)

    def can_fork(self, parent: Sequence, num_positions: int) -> bool:
        """``parent`` still has all of its first ``num_positions`` positions that a query after them sees."""
        return parent.num_computed >= num_positions and parent.num_trimmed <= self.cache.first_visible(num_positions) // self.block_size

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies noted since the last call, in order."""
        copies, self._copies = self._copies, []
        return copies

    # Commands.

    def start(self, seq: Sequence, match: Match) -> None:
        """``seq`` owns what ``match`` holds, or gets back what was swapped out. The pool must have ``need(seq, match)`` blocks."""
        if self.caching:  # before a block is taken: evictions prune what nobody holds
            seq.node = match.node or self.cache.root(seq.request.salt)
            self.cache.hold(seq.node)
        self.pool.share([block for block in match.blocks if block >= 0])
        self.cache.found(match.blocks)
        for block in match.blocks:
            self._retain(seq, block)
        seq.block_table.extend(match.blocks)
        seq.num_borrowed = len(match.blocks)
        seq.num_trimmed = match.blocks.count(-1)
        seq.num_computed = match.num_positions
        if self._listener is not None:
            for block in match.blocks:
                if block >= 0:
                    self._listener(BlockShared(block, self.pool.ref_counts[block]))
        if seq.host_blocks is not None:
            self._swap_in(seq, seq.host_blocks)
        elif match.tail is not None:
            block = self._take_one()
            self._copy(match.tail[0], block)
            seq.block_table.append(block)
        seq.num_published = len(match.blocks)
        self._publish(seq)

    def grow(self, seq: Sequence, num_positions: int) -> bool:
        """Make ``seq``'s table cover ``num_positions`` positions, the last of them writable.

        False, with nothing changed, where the pool has too few blocks.
        """
        table = seq.block_table
        tail = len(table) - 1
        missing = -(-num_positions // self.block_size) - len(table)
        writes_tail = seq.shared_tail and seq.num_computed < min(num_positions, len(table) * self.block_size)
        copy = writes_tail and self.pool.ref_counts[table[tail]] > 1
        missing += copy
        if missing > 0:
            blocks = self.pool.take(missing)
            if blocks is None:
                return False
            if copy:
                block = blocks.pop()
                self._copy(table[tail], block)
                self.counters.blocks_copied += 1
                self.pool.release([table[tail]])
                table[tail] = block
                seq.num_sent = min(seq.num_sent, tail)
            table.extend(blocks)
        if writes_tail and not copy:  # the last owner: what others wrote behind this sequence's positions goes
            self.cache.forget_beyond(table[tail], seq.num_computed - tail * self.block_size)
        if num_positions > seq.num_computed:
            seq.shared_tail = False
        return True

    def fork(self, parent: Sequence, child: Sequence, num_positions: int) -> None:
        """``child``, which has no blocks, shares the blocks of ``parent``'s first ``num_positions`` positions."""
        count = self.blocks_for(num_positions)
        table = parent.block_table[:count]
        self.pool.share([block for block in table if block >= 0])
        child.block_table.extend(table)
        child.num_borrowed = num_positions // self.block_size  # the tail will be its own
        child.num_trimmed = min(parent.num_trimmed, count)
        child.num_computed = num_positions
        if num_positions % self.block_size:
            parent.shared_tail = child.shared_tail = True
        child.num_published = min(parent.num_published, num_positions // self.block_size)
        if parent.node is not None:
            node: Node = parent.node
            for _ in range(parent.num_published - child.num_published):
                assert node.parent is not None
                node = node.parent
            child.node = node
            self.cache.hold(node)
        if self._listener is not None:
            for block in table:
                if block >= 0:
                    self._listener(BlockShared(block, self.pool.ref_counts[block]))
        self._set_advance(child)

    def advance(self, seq: Sequence) -> None:
        """``seq.num_computed`` has reached ``seq.publish_at``: publish what is whole and known, give back what left the window."""
        self._publish(seq)
        if self.cache.window:
            table = seq.block_table
            first = min(self.cache.first_visible(seq.num_computed) // self.block_size, len(table))
            if first > seq.num_trimmed:
                gone = [block for block in table[seq.num_trimmed : first] if block >= 0]
                table[seq.num_trimmed : first] = [-1] * (first - seq.num_trimmed)
                seq.num_trimmed = first
                self.pool.release(reversed(gone))

    def free(self, seq: Sequence) -> None:
        """Give back every block of ``seq``. The one path that frees: finish, abort, preempt and error come here."""
        self._vacate(seq)
        if seq.host_blocks is not None:
            self._host_free.extend(block for block in seq.host_blocks if block >= 0)
            seq.host_blocks = None
            seq.num_swapped = 0

    def shrink(self, seq: Sequence) -> int:
        """Give back ``seq``'s last block; returns the computed positions that went with it."""
        table = seq.block_table
        block = table.pop()
        lost = max(0, seq.num_computed - len(table) * self.block_size)
        seq.num_computed -= lost
        seq.num_sent, seq.num_borrowed = min(seq.num_sent, len(table)), min(seq.num_borrowed, len(table))
        seq.shared_tail = False
        while seq.num_published > len(table):
            seq.num_published -= 1
            if (node := seq.node) is not None:
                assert node.parent is not None
                seq.node = node.parent
                self.cache.hold(seq.node)
                self.cache.drop(node)
        self.pool.release([block])
        self._set_advance(seq)
        return lost

    def trim(self, seq: Sequence) -> None:
        """Give back the blocks behind ``seq``'s computed positions: those of guessed tokens that were wrong."""
        table, keep = seq.block_table, self.blocks_for(seq.num_computed)
        if len(table) > keep:
            self.pool.release(reversed(table[keep:]))
            del table[keep:]
            seq.num_sent = min(seq.num_sent, keep)

    def swap_out(self, seq: Sequence) -> bool:
        """Move ``seq``'s blocks to the swap pool. False, with nothing changed, where it has too few."""
        need = len(seq.block_table) - seq.num_trimmed
        if need > len(self._host_free) or not seq.num_computed:
            return False
        host = [-1] * seq.num_trimmed + [self._host_free.pop() for _ in range(need)]
        for block, place in zip(seq.block_table, host, strict=True):
            if block >= 0:
                self._copy(block, place)
        seq.num_swapped = seq.num_computed
        self._vacate(seq)
        seq.host_blocks = host
        self.counters.blocks_swapped_out += need
        return True

    def reset(self, sequences: Iterable[Sequence]) -> None:
        """Forget all cached content: what was computed before is not found any more. ``sequences``: all that are live; those
        that run go on, and publish nothing."""
        for seq in sequences:
            if seq.node is not None:
                self.cache.drop(seq.node)
                seq.node = None
        for block in self.cache.clear():
            self.pool.discard(block)

    # Accounts.

    def stats(self, running: Iterable[Sequence]) -> KVStats:
        """Counts of the pool; ``running`` are the sequences that own blocks."""
        size = self.block_size
        last: dict[int, tuple[int, int]] = {}  # last block of tables → positions filled, tables that end with it
        for seq in running:
            if seq.block_table and (block := seq.block_table[-1]) >= 0:
                fill, tables = last.get(block, (0, 0))
                last[block] = max(fill, seq.num_computed - (len(seq.block_table) - 1) * size), tables + 1
        counts = self.pool.ref_counts
        # Where a table goes on behind the block, the block is full.
        empty = sum(size - fill for block, (fill, tables) in last.items() if tables == counts[block])
        pool, counters = self.pool, self.counters
        return KVStats(
            num_blocks=pool.num_blocks,
            block_size=size,
            free_blocks=pool.num_free,
            cached_blocks=self.cache.num_idle,
            shared_blocks=pool.num_shared,
            saved_blocks=pool.num_references - pool.num_owned,
            positions_used=pool.num_owned * size - empty,
            largest_free_run=pool.largest_free_run(),
            host_blocks=self.num_host_blocks,
            host_blocks_used=self.num_host_blocks - len(self._host_free),
            counters=counters.copy(),
        )

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove the counts against the tables of all live sequences. Raises AssertionError."""
        self.pool.check()
        self.cache.check()
        owners = [0] * self.pool.num_blocks
        writers: dict[int, Sequence] = {}
        users: dict[int, int] = {}
        held: list[int] = []
        for seq in sequences:
            table = seq.block_table
            assert len(table) >= self.blocks_for(seq.num_computed), f"{len(table)} blocks hold {seq.num_computed} computed positions"
            tokens = seq.num_tokens + seq.in_flight
            assert len(table) <= self.blocks_for(tokens), f"{len(table)} blocks for {tokens} tokens"
            assert all((block < 0) == (i < seq.num_trimmed) for i, block in enumerate(table)), "a hole in a block table"
            assert len(set(table[seq.num_trimmed :])) == len(table) - seq.num_trimmed, "a block is twice in a table"
            for block in table[seq.num_trimmed :]:
                owners[block] += 1
            if table and not seq.shared_tail and seq.num_computed < len(table) * self.block_size:
                assert table[-1] not in writers, f"block {table[-1]} has two writers"
                writers[table[-1]] = seq
            if seq.node is not None:
                users[id(seq.node)] = users.get(id(seq.node), 0) + 1
                assert seq.node.users >= users[id(seq.node)]
            self.cache.check_holds(seq.tokens, table, seq.num_computed)
            held += [block for block in seq.host_blocks or () if block >= 0]
            assert not (table and seq.host_blocks), "a sequence is both in the pool and in the swap pool"
        assert owners == self.pool.ref_counts, "reference counts differ from the tables' owners"
        for block in writers:
            assert owners[block] == 1, f"block {block} is written by one of {owners[block]} owners"
        places = held + self._host_free
        assert len(places) == len(set(places)) == self.num_host_blocks, "a block of the swap pool is lost, or has two owners"

    def _publish(self, seq: Sequence) -> None:
        size, computed = self.block_size, min(seq.num_computed, len(seq.tokens))
        node = seq.node
        if node is not None:
            if node.block < 0 and (seq.num_published + 1) * size <= computed:
                self._restore(seq)
            while (seq.num_published + 1) * size <= computed:
                start = seq.num_published * size
                block = seq.block_table[seq.num_published]
                parent, node = node, self.cache.publish(node, self.cache.key(seq.tokens, start), block)
                self.cache.hold(node)
                self.cache.drop(parent)
                if 0 <= node.block != block >= 0 and not self.pool.ref_counts[node.block]:
                    # The same is in an idle block: that one would be evicted while this one is in use, and the content be lost.
                    self.pool.discard(self.cache.move(node, block))
                self._retain(seq, node.block)  # another one, where two have computed the same
                seq.num_published += 1
            seq.node = node
            if seq.num_computed == seq.num_prompt:
                self._publish_tail(seq)
        else:
            seq.num_published = computed // size
        self._set_advance(seq)

    def _restore(self, seq: Sequence) -> None:
        """What ``seq`` has made others made too, and theirs was evicted: from here on its own is found."""
        node, i = seq.node, seq.num_published - 1
        gone: list[tuple[Node, int]] = []
        while node is not None and node.parent is not None and seq.block_table[i] >= 0:
            if node.block < 0:
                gone.append((node, i))
            node, i = node.parent, i - 1
        for node, i in reversed(gone):
            assert node.parent is not None
            self.cache.publish(node.parent, node.key, seq.block_table[i])

    def _publish_tail(self, seq: Sequence) -> None:
        """Publish the partly filled last block, unless another owner may go on to write it."""
        computed = min(seq.num_computed, len(seq.tokens))
        filled = computed % self.block_size
        if seq.node is None or not filled or seq.num_published != computed // self.block_size:
            return
        block = seq.block_table[seq.num_published]
        if self.pool.ref_counts[block] == 1:
            start = computed - filled
            self.cache.publish(seq.node, self.cache.key(seq.tokens[:computed], start), block)
            self._retain(seq, block)

    def _set_advance(self, seq: Sequence) -> None:
        at = (seq.num_published + 1) * self.block_size
        seq.publish_at = min(at, seq.num_prompt) if seq.num_computed < seq.num_prompt else at

    def _retain(self, seq: Sequence, block: int) -> None:
        if (wish := seq.request.retention) is not None:
            self.cache.retain(block, wish.priority, wish.seconds)

    def _vacate(self, seq: Sequence) -> None:
        """Give back the blocks of the pool, the last first: it goes first when memory is needed."""
        if seq.block_table:
            self._restore(seq)
            self._publish_tail(seq)
            self.pool.release([block for block in reversed(seq.block_table) if block >= 0])
            seq.block_table.clear()
        if seq.node is not None:
            self.cache.drop(seq.node)
            seq.node = None
        seq.num_computed = seq.num_sent = seq.num_trimmed = seq.num_borrowed = seq.num_published = 0
        seq.shared_tail = False
        seq.publish_at = NEVER

    def _swap_in(self, seq: Sequence, host: list[int]) -> None:
        """The rest of what was swapped out, after what is in the table already."""
        table = seq.block_table
        for place in host[len(table) :]:
            if place < 0:
                table.append(-1)
                seq.num_trimmed += 1
            else:
                table.append(self._take_one())
                self._copy(place, table[-1])
                self.counters.blocks_swapped_in += 1
        self._host_free.extend(place for place in host if place >= 0)
        seq.num_computed = max(seq.num_borrowed * self.block_size, seq.num_swapped)
        seq.host_blocks = None
        seq.num_swapped = 0

    def _take_one(self) -> int:
        blocks = self.pool.take(1)
        assert blocks is not None, "start() was called without looking at need()"
        return blocks[0]

    def _copy(self, source: int, destination: int) -> None:
        if source != destination:
            self._copies.append((source, destination))
        if self._listener is not None:
            self._listener(BlockCopied(source, destination))
