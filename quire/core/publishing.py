"""Publisher: what a sequence has computed becomes content that others find, block by block.

    tokens     ################ ################ #######         num_published whole blocks are nodes of the cache's trie, below each
    content    node ----------- node                             other; ``seq.node`` is the last one, and held, so that it stays

A sequence without a node publishes nothing, but its blocks are counted all the same. Of a sequence this changes ``node``, ``num_published``
and ``publish_at``, never its table or a block's owners.
"""

from __future__ import annotations

from quire.core.block_pool import BlockPool
from quire.core.content import Node
from quire.core.prefix_cache import PrefixCache
from quire.core.sequence import Sequence

NEVER = 1 << 62


class Publisher:
    """Publishes in ``cache`` what sequences hold in the blocks of ``pool``."""

    __slots__ = ("_pool", "_width", "block_size", "cache")

    def __init__(self, cache: PrefixCache, pool: BlockPool) -> None:
        self.cache = cache
        self.block_size = cache.block_size
        self._pool = pool
        self._width = cache.groups.width

    def hold(self, seq: Sequence, node: Node, num_published: int) -> None:
        """``seq``, which had none, is at ``node``, below the root by so many blocks."""
        seq.node, seq.num_published = node, num_published
        self.cache.hold(node)

    def drop(self, seq: Sequence) -> None:
        """``seq`` publishes nothing from now on."""
        if seq.node is not None:
            self.cache.drop(seq.node)
            seq.node = None

    def leave(self, seq: Sequence) -> None:
        """``seq`` has given its blocks back."""
        self.drop(seq)
        seq.num_published = 0
        seq.publish_at = NEVER

    def fork(self, parent: Sequence, child: Sequence, num_positions: int) -> None:
        """``child`` begins as ``parent`` was after ``num_positions`` positions."""
        child.num_published = min(parent.num_published, num_positions // self.block_size)
        if parent.node is not None:
            node: Node = parent.node
            for _ in range(parent.num_published - child.num_published):
                assert node.parent is not None
                node = node.parent
            self.hold(child, node, child.num_published)
        self._set_advance(child)

    def go_back(self, seq: Sequence, keep: int) -> None:
        """``seq`` has no more than ``keep`` logical blocks now. What it has published may be found as before."""
        while seq.num_published > keep:
            seq.num_published -= 1
            if (node := seq.node) is not None:
                assert node.parent is not None
                seq.node = node.parent
                self.cache.hold(seq.node)
                self.cache.drop(node)
        self._set_advance(seq)

    def publish(self, seq: Sequence) -> None:
        """What is whole, and of known tokens; and the end of the prompt."""
        size, computed = self.block_size, min(seq.num_computed, len(seq.tokens))
        node = seq.node
        if node is not None:
            if not node.complete and (seq.num_published + 1) * size <= computed:
                self._restore(seq)
            while (seq.num_published + 1) * size <= computed:
                start = seq.num_published * size
                blocks = seq.block_table[seq.num_published * self._width : (seq.num_published + 1) * self._width]
                parent, node = node, self.cache.publish(node, self.cache.key(seq.tokens, start), blocks)
                self.cache.hold(node)
                self.cache.drop(parent)
                if node.blocks != blocks:  # two have computed the same
                    self._take_over(node, blocks)
                if seq.request.retention is not None:
                    self.retain(seq, max(node.blocks))
                seq.num_published += 1
            seq.node = node
            if seq.num_computed == seq.num_prompt:
                self._publish_tail(seq)
        else:
            seq.num_published = computed // size
        self._set_advance(seq)

    def publish_rest(self, seq: Sequence) -> None:
        """``seq`` is about to give its blocks back: all of them that can be are found from now on."""
        self._restore(seq)
        self._publish_tail(seq)

    def retain(self, seq: Sequence, block: int) -> None:
        """As ``seq``'s request wishes."""
        if (wish := seq.request.retention) is not None:
            self.cache.retain(block, wish.priority, wish.seconds)

    def _publish_tail(self, seq: Sequence) -> None:
        """Publish the partly filled last block, unless another owner may go on to write it."""
        computed = min(seq.num_computed, len(seq.tokens))
        filled = computed % self.block_size
        if seq.node is None or not filled or seq.num_published != computed // self.block_size:
            return
        blocks = seq.block_table[seq.num_published * self._width : (seq.num_published + 1) * self._width]
        if all(block >= 0 and self._pool.ref_counts[block] == 1 for block in blocks):
            start = computed - filled
            self.cache.publish(seq.node, self.cache.key(seq.tokens[:computed], start), blocks)
            self.retain(seq, blocks[0])

    def _restore(self, seq: Sequence) -> None:
        """What ``seq`` has made others made too, and theirs was evicted: from here on its own is found."""
        node, i = seq.node, seq.num_published - 1
        gone: list[tuple[Node, list[int]]] = []
        table, width = seq.block_table, self._width
        while node is not None and node.parent is not None and max(blocks := table[i * width : (i + 1) * width]) >= 0:
            if min(node.blocks) < 0 and node.blocks != blocks:
                gone.append((node, blocks))
            node, i = node.parent, i - 1
        for node, blocks in reversed(gone):
            assert node.parent is not None
            self.cache.publish(node.parent, node.key, blocks)

    def _take_over(self, node: Node, blocks: list[int]) -> None:
        """What ``node``'s content is in, where that is idle, gives it to ``blocks``: it would be evicted while these are in use, and the
        content be lost."""
        for group, (block, other) in enumerate(zip(blocks, node.blocks, strict=True)):
            if 0 <= other != block >= 0 and not self._pool.ref_counts[other]:
                self._pool.discard(self.cache.move(node, group, block))

    def _set_advance(self, seq: Sequence) -> None:
        at = (seq.num_published + 1) * self.block_size
        seq.publish_at = min(at, seq.num_prompt) if seq.num_computed < seq.num_prompt else at
