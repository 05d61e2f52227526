"""BlockManager: the only code that changes block tables and reference counts.

    logical   [ block 0 ][ block 1 ][ block 2 ]        one sequence's positions, block_size each
    physical     17         4          9               its BlockTable: anywhere in the pool
    tokens     ################ ########               num_computed positions written; the rest of block 2 is its empty tail

Where layers see differently far they are in several groups (groups.py). Then a logical block is a block of each group, side by side in the
table; of windowed groups those that the window has left behind are given back. A sequence's counts of blocks are logical ones.

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
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.prefix_cache import NOTHING, Match, PrefixCache
from quire.core.sequence import Sequence
from quire.core.stats import KVCounters, KVStats

NEVER = 1 << 62


class BlockManager:
    """Owns the pool. ``block_size`` positions to a block; see the module's drawing.

    caching: publish what is computed, and find it. groups: the layers'. step: positions that a step computes at most, where groups have a
    window. num_host_blocks: size of the swap pool; its ids follow those of the pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool = True,
        groups: KVGroups = ONE_GROUP,
        step: int = 1 << 30,
        num_host_blocks: int = 0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.block_size = block_size
        self.caching = caching
        self.num_host_blocks = num_host_blocks
        self.groups = groups
        self.width = groups.width
        """Blocks of the pool in a logical block."""
        self._step = step
        self.cache = PrefixCache(num_blocks, block_size, groups, clock)
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
        """Logical blocks that hold ``num_positions`` positions of one sequence."""
        return -(-num_positions // self.block_size)

    def match(self, seq: Sequence) -> Match:
        """What the cache holds of ``seq``'s tokens."""
        if not self.caching:
            return NOTHING
        tokens = seq.tokens if seq.findable >= len(seq.tokens) else seq.tokens[: seq.findable]
        match = self.cache.match(seq.request.salt, tokens)
        if seq.host_blocks is None:
            return match
        if match.whole_positions < self._trimmed(seq.host_blocks) * self.block_size:
            return NOTHING  # there would be a hole between what is found and what was swapped out
        return Match(match.node, match.blocks, None, match.whole_positions)

    def need(self, seq: Sequence, match: Match) -> int:
        """Free blocks that ``seq`` takes until all its known tokens are computed, if it starts with ``match``."""
        counts = self.pool.ref_counts
        revived = sum(block >= 0 and counts[block] == 0 for block in match.blocks)
        return self._to_come(seq.num_tokens, len(match.blocks) // self.width, self._trimmed(match.blocks)) + revived

    def shared(self, match: Match) -> int:
        """Logical blocks of ``match`` that have an owner already, or that the window has left behind: they cost nothing."""
        counts = self.pool.ref_counts
        return sum(block < 0 or counts[block] > 0 for block in match.blocks[:: self.width])

    def need_fork(self, seq: Sequence) -> int:
        """Free blocks that ``seq`` takes until all its known tokens are computed, if it starts as a fork at the end of its prompt;
        one logical block is for the copy of the partly filled one."""
        begun = self.blocks_for(seq.num_prompt)
        trimmed = self.groups.first_visible(seq.num_prompt) // self.block_size
        return self._to_come(seq.num_tokens, begun, trimmed) + self.width * (seq.num_prompt % self.block_size > 0)

    def lacking(self, seq: Sequence, num_positions: int | None = None) -> int:
        """Free blocks that a running ``seq`` takes until all its known tokens, or ``num_positions``, are computed."""
        return self._to_come(num_positions or len(seq.tokens), len(seq.block_table) // self.width, seq.num_trimmed)

    def missing(self, seq: Sequence, num_positions: int) -> int:
        """Blocks that ``seq``'s table lacks to cover ``num_positions`` in one step."""
        return max(0, -(-num_positions // self.block_size) - len(seq.block_table) // self.width) * self.width

    def _to_come(self, num_positions: int, have: int, trimmed: int) -> int:
        """Blocks that a sequence with ``have`` logical blocks, of which windows have left ``trimmed``, takes up to ``num_positions``."""
        groups, size = self.groups, self.block_size
        more = -(-num_positions // size) - have
        blocks = groups.full * more
        if groups.windowed:  # it never has more of them at a time than the longest of its steps needs
            most = groups.most_windowed(size, min(self._step, (more + 1) * size))
            blocks += groups.windowed * max(0, min(more, most - (have - trimmed)))
        return blocks

    def _trimmed(self, table: list[int]) -> int:
        """Logical blocks of a table that windows have left behind."""
        return table.count(-1) // self.groups.windowed if self.groups.windowed else 0

    def can_fork(self, parent: Sequence, num_positions: int) -> bool:
        """``parent`` still has all of its first ``num_positions`` positions that a query after them sees."""
        return parent.num_computed >= num_positions and parent.num_trimmed <= self.groups.first_visible(num_positions) // self.block_size

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
        seq.num_borrowed = seq.num_published = len(match.blocks) // self.width
        seq.num_trimmed = self._trimmed(match.blocks)
        seq.num_computed = match.num_positions
        self._tell_shared(match.blocks)
        if seq.host_blocks is not None:
            self._swap_in(seq, seq.host_blocks)
        elif match.tail is not None:
            seq.block_table.extend(self._copies_of(match.tail[0]))
        self._publish(seq)

    def grow(self, seq: Sequence, num_positions: int) -> bool:
        """Make ``seq``'s table cover ``num_positions`` positions, the last of them writable.

        False, with nothing changed, where the pool has too few blocks.
        """
        table, width = seq.block_table, self.width
        have = len(table) // width
        missing = self.missing(seq, num_positions)
        mine: list[int] = []
        shared: list[int] = []
        if seq.shared_tail and seq.num_computed < min(num_positions, have * self.block_size):
            for at in range(len(table) - width, len(table)):
                (shared if self.pool.ref_counts[table[at]] > 1 else mine).append(at)
            missing += len(shared)
        if missing:
            blocks = self.pool.take(missing)
            if blocks is None:
                return False
            for at in shared:
                block = blocks.pop()
                self._copy(table[at], block)
                self.counters.blocks_copied += 1
                self.pool.release([table[at]])
                table[at] = block
                seq.num_sent = min(seq.num_sent, have - 1)
            table.extend(blocks)
        for at in mine:  # the last owner: what others wrote behind this sequence's positions goes
            self.cache.forget_beyond(table[at], seq.num_computed - (have - 1) * self.block_size)
        if num_positions > seq.num_computed:
            seq.shared_tail = False
        return True

    def fork(self, parent: Sequence, child: Sequence, num_positions: int) -> None:
        """``child``, which has no blocks, shares the blocks of ``parent``'s first ``num_positions`` positions."""
        count = self.blocks_for(num_positions)
        table = parent.block_table[: count * self.width]
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
        self._tell_shared(table)
        self._set_advance(child)

    def advance(self, seq: Sequence) -> None:
        """``seq.num_computed`` has reached ``seq.publish_at``: publish what is whole and known, give back what left the window."""
        self._publish(seq)
        groups = self.groups
        if groups.windowed:
            table, width = seq.block_table, self.width
            first = min(groups.first_visible(seq.num_computed) // self.block_size, len(table) // width)
            gone: list[int] = []
            for at in range(seq.num_trimmed * width, first * width, width):
                gone += table[at + groups.full : at + width]
                table[at + groups.full : at + width] = [-1] * groups.windowed
            if gone:
                seq.num_trimmed = first
                self.pool.release(gone, left=True)

    def send(self, seq: Sequence, first: int) -> list[int]:
        """The blocks of ``seq``'s table from its logical block ``first`` on; the backend knows all of them from now on."""
        table = seq.block_table
        seq.num_sent = len(table) // self.width
        return table[first * self.width :] if first < seq.num_sent else []

    def free(self, seq: Sequence) -> None:
        """Give back every block of ``seq``. The one path that frees: finish, abort, preempt and error come here."""
        self._vacate(seq)
        if seq.host_blocks is not None:
            self._host_free.extend(block for block in seq.host_blocks if block >= 0)
            seq.host_blocks = None
            seq.num_swapped = 0

    def shrink(self, seq: Sequence) -> int:
        """Give back ``seq``'s last block; returns the computed positions that went with it."""
        keep = len(seq.block_table) // self.width - 1
        lost = max(0, seq.num_computed - keep * self.block_size)
        seq.num_computed -= lost
        seq.num_borrowed = min(seq.num_borrowed, keep)
        seq.shared_tail = False
        while seq.num_published > keep:
            seq.num_published -= 1
            if (node := seq.node) is not None:
                assert node.parent is not None
                seq.node = node.parent
                self.cache.hold(seq.node)
                self.cache.drop(node)
        self._cut(seq, keep)
        self._set_advance(seq)
        return lost

    def trim(self, seq: Sequence) -> None:
        """Give back the blocks behind ``seq``'s computed positions: those of guessed tokens that were wrong."""
        self._cut(seq, self.blocks_for(seq.num_computed))

    def _cut(self, seq: Sequence, keep: int) -> None:
        """Give back all but the first ``keep`` logical blocks of ``seq``; no window has left the others."""
        table, end = seq.block_table, keep * self.width
        if len(table) > end:
            self.pool.release(reversed(table[end:]))
            del table[end:]
            seq.num_sent = min(seq.num_sent, keep)

    def swap_out(self, seq: Sequence) -> bool:
        """Move ``seq``'s blocks to the swap pool. False, with nothing changed, where it has too few."""
        need = len(seq.block_table) - seq.num_trimmed * self.groups.windowed
        if need > len(self._host_free) or not seq.num_computed:
            return False
        host = [self._host_free.pop() if block >= 0 else -1 for block in seq.block_table]
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
        size, width = self.block_size, self.width
        last: dict[int, tuple[int, int]] = {}  # last block of tables → positions filled, tables that end with it
        for seq in running:
            filled = seq.num_computed - (len(seq.block_table) // width - 1) * size
            for block in seq.block_table[-width:]:
                if block >= 0:
                    fill, tables = last.get(block, (0, 0))
                    last[block] = max(fill, filled), tables + 1
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
            groups=self.width,
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
        full, width = self.groups.full, self.width
        for seq in sequences:
            table = seq.block_table
            have, part = divmod(len(table), width)
            assert not part, "a group lacks a block"
            assert have >= self.blocks_for(seq.num_computed), f"{have} blocks hold {seq.num_computed} computed positions"
            tokens = seq.num_tokens + seq.in_flight
            assert have <= self.blocks_for(tokens), f"{have} blocks for {tokens} tokens"
            assert all((block < 0) == (i % width >= full and i // width < seq.num_trimmed) for i, block in enumerate(table)), (
                "a hole in a block table"
            )
            own = [block for block in table if block >= 0]
            assert len(set(own)) == len(own), "a block is twice in a table"
            for block in own:
                owners[block] += 1
            if not seq.shared_tail and seq.num_computed < have * self.block_size:
                for block in table[-width:]:
                    assert block not in writers, f"block {block} has two writers"
                    writers[block] = seq
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
            if not node.complete and (seq.num_published + 1) * size <= computed:
                self._restore(seq)
            while (seq.num_published + 1) * size <= computed:
                start = seq.num_published * size
                blocks = seq.block_table[seq.num_published * self.width : (seq.num_published + 1) * self.width]
                parent, node = node, self.cache.publish(node, self.cache.key(seq.tokens, start), blocks)
                self.cache.hold(node)
                self.cache.drop(parent)
                if node.blocks != blocks:  # two have computed the same
                    self._take_over(node, blocks)
                if seq.request.retention is not None:
                    self._retain(seq, max(node.blocks))
                seq.num_published += 1
            seq.node = node
            if seq.num_computed == seq.num_prompt:
                self._publish_tail(seq)
        else:
            seq.num_published = computed // size
        self._set_advance(seq)

    def _take_over(self, node: Node, blocks: list[int]) -> None:
        """What ``node``'s content is in, where that is idle, gives it to ``blocks``: it would be evicted while these are in use, and the
        content be lost."""
        for group, (block, other) in enumerate(zip(blocks, node.blocks, strict=True)):
            if 0 <= other != block >= 0 and not self.pool.ref_counts[other]:
                self.pool.discard(self.cache.move(node, group, block))

    def _restore(self, seq: Sequence) -> None:
        """What ``seq`` has made others made too, and theirs was evicted: from here on its own is found."""
        node, i = seq.node, seq.num_published - 1
        gone: list[tuple[Node, list[int]]] = []
        table, width = seq.block_table, self.width
        while node is not None and node.parent is not None and max(blocks := table[i * width : (i + 1) * width]) >= 0:
            if min(node.blocks) < 0 and node.blocks != blocks:
                gone.append((node, blocks))
            node, i = node.parent, i - 1
        for node, blocks in reversed(gone):
            assert node.parent is not None
            self.cache.publish(node.parent, node.key, blocks)

    def _publish_tail(self, seq: Sequence) -> None:
        """Publish the partly filled last block, unless another owner may go on to write it."""
        computed = min(seq.num_computed, len(seq.tokens))
        filled = computed % self.block_size
        if seq.node is None or not filled or seq.num_published != computed // self.block_size:
            return
        blocks = seq.block_table[seq.num_published * self.width : (seq.num_published + 1) * self.width]
        if all(block >= 0 and self.pool.ref_counts[block] == 1 for block in blocks):
            start = computed - filled
            self.cache.publish(seq.node, self.cache.key(seq.tokens[:computed], start), blocks)
            self._retain(seq, blocks[0])

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
        seq.num_trimmed += self._trimmed(host[len(table) :])
        for place in host[len(table) :]:
            if place < 0:
                table.append(-1)
            else:
                table += self._take(1)
                self._copy(place, table[-1])
                self.counters.blocks_swapped_in += 1
        self._host_free.extend(place for place in host if place >= 0)
        seq.num_computed = max(seq.num_borrowed * self.block_size, seq.num_swapped)
        seq.host_blocks = None
        seq.num_swapped = 0

    def _tell_shared(self, blocks: list[int]) -> None:
        if self._listener is not None:
            for block in blocks:
                if block >= 0:
                    self._listener(BlockShared(block, self.pool.ref_counts[block]))

    def _copies_of(self, sources: list[int]) -> list[int]:
        """Copies of cached blocks. Their own memory may be handed out for that: then it stays in its place, or a copy into it would come
        before it is read."""
        taken = self._take(len(sources))
        others = [block for block in taken if block not in sources]
        copies = [source if source in taken else others.pop() for source in sources]
        for source, block in zip(sources, copies, strict=True):
            self._copy(source, block)
        return copies

    def _take(self, count: int) -> list[int]:
        blocks = self.pool.take(count)
        assert blocks is not None, "start() was called without looking at need()"
        return blocks

    def _copy(self, source: int, destination: int) -> None:
        if source != destination:
            self._copies.append((source, destination))
        if self._listener is not None:
            self._listener(BlockCopied(source, destination))
