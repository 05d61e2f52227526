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

from quire.core import accounts
from quire.core.block_pool import BlockPool
from quire.core.events import BlockCopied, BlockShared, Listener
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.needs import Needs
from quire.core.prefix_cache import NOTHING, Match, PrefixCache
from quire.core.publishing import Publisher
from quire.core.sequence import Sequence
from quire.core.stats import KVCounters, KVStats
from quire.core.swap_pool import SwapPool


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
        self.groups = groups
        self.width = groups.width
        """Blocks of the pool in a logical block."""
        self.cache = PrefixCache(num_blocks, block_size, groups, clock)
        self.pool = BlockPool(num_blocks, self.cache, clock)
        self.needs = Needs(self.pool, block_size, groups, step)
        self.counters = KVCounters()
        self.swap_pool = SwapPool(num_blocks, num_host_blocks)
        self._publisher = Publisher(self.cache, self.pool)
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
        full, trimmed = self.groups.full, self.groups.num_trimmed(seq.host_blocks)
        if match.whole_positions < trimmed * self.block_size:
            return NOTHING  # there would be a hole between what is found and what was swapped out
        blocks = match.blocks.copy()
        for at in range(0, trimmed * self.width, self.width):  # its window has gone on
            blocks[at + full : at + self.width] = [-1] * self.groups.windowed
        return Match(match.node, blocks, None, match.whole_positions)

    def missing(self, seq: Sequence, num_positions: int) -> int:
        """Blocks that ``seq``'s table lacks to cover ``num_positions`` in one step."""
        return max(0, -(-num_positions // self.block_size) - len(seq.block_table) // self.width) * self.width

    def can_fork(self, parent: Sequence, num_positions: int) -> bool:
        """``parent`` still has all of its first ``num_positions`` positions that a query after them sees."""
        return parent.num_computed >= num_positions and parent.num_trimmed <= self.groups.first_visible(num_positions) // self.block_size

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies noted since the last call, in order."""
        copies, self._copies = self._copies, []
        return copies

    # Commands.

    def start(self, seq: Sequence, match: Match) -> None:
        """``seq`` owns what ``match`` holds, or gets back what was swapped out. The pool must have ``needs.start(seq, match)``
        blocks."""
        if self.caching:  # before a block is taken: evictions prune what nobody holds
            self._publisher.hold(seq, match.node or self.cache.root(seq.request.salt), len(match.blocks) // self.width)
        self.pool.share([block for block in match.blocks if block >= 0])
        self.cache.found(match.blocks)
        for block in match.blocks:
            self._publisher.retain(seq, block)
        seq.block_table.extend(match.blocks)
        seq.num_borrowed = len(match.blocks) // self.width
        seq.num_trimmed = self.groups.num_trimmed(match.blocks)
        seq.num_computed = match.num_positions
        self._tell_shared(match.blocks)
        if seq.host_blocks is not None:
            self._swap_in(seq, seq.host_blocks)
        elif match.tail is not None:
            seq.block_table.extend(self._copies_of(match.tail[0]))
        self._publisher.publish(seq)

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
        self._publisher.fork(parent, child, num_positions)
        self._tell_shared(table)

    def advance(self, seq: Sequence) -> None:
        """``seq.num_computed`` has reached ``seq.publish_at``: publish what is whole and known, give back what left the window."""
        self._publisher.publish(seq)
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
            self.swap_pool.give(seq.host_blocks)
            seq.host_blocks = None
            seq.num_swapped = 0

    def shrink(self, seq: Sequence) -> int | None:
        """Give back ``seq``'s last block; returns the computed positions that went with it. None, with nothing changed, where a window has
        left what the positions from there on see."""
        keep = len(seq.block_table) // self.width - 1
        lost = max(0, seq.num_computed - keep * self.block_size)
        if not self.can_fork(seq, seq.num_computed - lost):
            return None
        seq.num_computed -= lost
        seq.num_borrowed = min(seq.num_borrowed, keep)
        seq.shared_tail = False
        self._publisher.go_back(seq, keep)
        self._cut(seq, keep)
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
        places = self.swap_pool.take(seq.block_table) if seq.num_computed else None
        if places is None:
            return False
        for block, place in zip(seq.block_table, places, strict=True):
            if block >= 0:
                self._copy(block, place)
                self.counters.blocks_swapped_out += 1
        seq.num_swapped = seq.num_computed
        self._vacate(seq)
        seq.host_blocks = places
        return True

    def reset(self, sequences: Iterable[Sequence]) -> None:
        """Forget all cached content: what was computed before is not found any more. ``sequences``: all that are live; those
        that run go on, and publish nothing."""
        for seq in sequences:
            self._publisher.drop(seq)
        for block in self.cache.clear():
            self.pool.discard(block)

    # Accounts.

    def stats(self, running: Iterable[Sequence]) -> KVStats:
        """Counts of the pool; ``running`` are the sequences that own blocks."""
        return accounts.stats(self, running)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove the counts against the tables of all live sequences. Raises AssertionError."""
        accounts.check(self, sequences)

    def _vacate(self, seq: Sequence) -> None:
        """Give back the blocks of the pool, the last first: it goes first when memory is needed."""
        if seq.block_table:
            self._publisher.publish_rest(seq)
            self.pool.release([block for block in reversed(seq.block_table) if block >= 0])
            seq.block_table.clear()
        self._publisher.leave(seq)
        seq.num_computed = seq.num_sent = seq.num_trimmed = seq.num_borrowed = 0
        seq.shared_tail = False

    def _swap_in(self, seq: Sequence, host: list[int]) -> None:
        """The rest of what was swapped out, after what is in the table already."""
        table = seq.block_table
        seq.num_trimmed += self.groups.num_trimmed(host[len(table) :])
        for place in host[len(table) :]:
            if place < 0:
                table.append(-1)
            else:
                table += self._take(1)
                self._copy(place, table[-1])
                self.counters.blocks_swapped_in += 1
        self.swap_pool.give(host)
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
        assert blocks is not None, "start() was called without looking at needs.start()"
        return blocks

    def _copy(self, source: int, destination: int) -> None:
        if source != destination:
            self._copies.append((source, destination))
        if self._listener is not None:
            self._listener(BlockCopied(source, destination))
