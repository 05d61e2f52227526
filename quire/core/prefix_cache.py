"""PrefixCache: what the blocks hold, so that a prompt finds what was computed before.

Content is a trie of nodes, one for each block's tokens, below one root for each salt:

    root(salt) ── "You are a helpful ass" ── "istant. What is the c" ── "apital of France? Pa"   <- a partly filled block
                       block 17                    block 4           └─ "olour of the sky? Bl"
                                                                             block 9

Where layers are in several groups (groups.py), a node has a block for each of them. Those of windowed groups go first: a prompt finds
nodes up to where all that a window holds before it is there too.

A node's place in the trie is its identity: a lookup compares every token from the root on, and each level is found by the
tokens themselves, so that no two prefixes can be taken for each other, whatever their hashes. A node whose block was handed
out for something else stays as a *ghost* while it has descendants, and for a while after; when its tokens are computed again,
its descendants are found again.

Which of the idle blocks (content, but no owner) goes when memory is needed: see eviction.py.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quire.core.content import TOKEN_BYTES, Node, common_tokens, decode, encode
from quire.core.events import BlockEvicted, BlockRemoved, BlockStored, Listener
from quire.core.eviction import EvictionOrder
from quire.core.groups import ONE_GROUP, KVGroups


@dataclass(slots=True, frozen=True)
class Match:
    """What the cache holds of the beginning of some tokens."""

    node: Node | None
    """The last whole block's; None where nothing is known under the salt."""
    blocks: list[int]
    """Of the whole blocks' positions, as in a block table; -1 for those that a sliding window has left behind, and nobody needs."""
    tail: tuple[list[int], int] | None
    """(blocks, count): the first ``count`` tokens of ``blocks``, one of each group, are the next ones; they have to be copied."""
    num_positions: int
    """Positions that all of these hold."""

    @property
    def whole_positions(self) -> int:
        """Those in whole blocks."""
        return self.num_positions - (self.tail[1] if self.tail else 0)


NOTHING = Match(None, [], None, 0)


class PrefixCache:
    """Content of the blocks of a pool."""

    def __init__(self, num_blocks: int, block_size: int, groups: KVGroups = ONE_GROUP, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.block_size = block_size
        self.groups = groups
        self.listener: Listener | None = None
        self._clock = clock
        self._nodes: dict[int, Node] = {}
        """Block → its content."""
        self._roots: dict[bytes, Node] = {}
        self._order = EvictionOrder(num_blocks)
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_idle(self) -> int:
        return len(self._order)

    def root(self, salt: bytes) -> Node:
        """Where the prefixes under ``salt`` begin."""
        if (root := self._roots.get(salt)) is None:
            root = self._roots[salt] = self._node(None, salt, salt)
        return root

    def key(self, tokens: Sequence[int], start: int) -> bytes:
        """The key of the block that begins at position ``start``; shorter than a whole one where the tokens end."""
        return encode(tokens[start : start + self.block_size])

    # Lookup changes nothing.

    def match(self, salt: bytes, tokens: Sequence[int]) -> Match:
        """The longest beginning of ``tokens`` that the blocks hold."""
        node = self._roots.get(salt)
        if node is None:
            return NOTHING
        groups, full = self.groups, self.groups.full
        data, width = encode(tokens), self.block_size * TOKEN_BYTES
        path: list[Node] = []
        for at in range(0, len(data) - width + 1, width):
            child = node.children.get(data[at : at + width])
            if child is None or (full and min(child.blocks[:full]) < 0):
                break
            path.append(child)
            node = child
        count = len(path)
        if groups.windowed:
            count, node = self._windowed(path, self._roots[salt])
        first = groups.first_visible(count * self.block_size) // self.block_size
        blocks: list[int] = []
        left_behind = [-1] * groups.windowed
        for i in range(count):
            blocks += path[i].blocks if i >= first else path[i].blocks[:full] + left_behind
        tail = self._tail(node, data[count * width : (count + 1) * width])
        return Match(node, blocks, tail, count * self.block_size + (tail[1] if tail else 0))

    def _windowed(self, path: list[Node], root: Node) -> tuple[int, Node]:
        """Nodes of ``path`` of which a later query finds all that it sees."""
        groups, size = self.groups, self.block_size
        run = best = 0
        for i, node in enumerate(path):
            run = run + 1 if min(node.blocks[groups.full :]) >= 0 else 0
            end = i + 1
            if run >= end - groups.first_visible(end * size) // size:
                best = end
        return best, path[best - 1] if best else root

    def _tail(self, node: Node, key: bytes) -> tuple[list[int], int] | None:
        """The child of ``node`` that begins with most tokens of ``key``."""
        if not key or not node.keys:
            return None
        at = bisect_left(node.keys, key)
        best, count = b"", 0
        for sibling in node.keys[max(0, at - 1) : at + 1]:
            if (common := common_tokens(sibling, key)) > count:
                best, count = sibling, common
        return (node.children[best].blocks.copy(), count) if count else None

    # Content comes and goes.

    def publish(self, parent: Node, key: bytes, blocks: Sequence[int]) -> Node:
        """``blocks``, one of each group, hold ``key`` after ``parent``'s content. Returns the content's node, which may be that of other
        blocks.

        The content of blocks can only have grown since it was last published. Block -1 is one that left the window before it was
        published: the content's place in the trie is needed all the same.
        """
        node = None
        for block in blocks:
            if (old := self._nodes.get(block)) is not None:
                if old.key == key:
                    node = old
                else:
                    self._unlink(block)
        if node is None and (node := parent.children.get(key)) is None:
            if len(key) < self.block_size * TOKEN_BYTES and self._covered(parent, key):
                return parent
            node = parent.children[key] = self._node(parent, key, parent.salt)
        there = node.blocks
        if min(there) < 0:
            for group, block in enumerate(blocks):
                if there[group] < 0 <= block:
                    there[group] = block
                    self._nodes[block] = node
                    if node.remembered:
                        self._order.returned(node)
                    if group == 0 and self.listener is not None:
                        before = 0 if parent.parent is None else parent.number
                        self.listener(BlockStored(block, node.number, before, decode(key), node.salt))
            if min(there) >= 0:
                insort(parent.keys, key)
        return node

    def move(self, node: Node, group: int, block: int) -> int:
        """``node``'s content, whose block for ``group`` is idle, is also in ``block``, which has an owner, and stays there from now on.
        Returns the idle one, which is empty now."""
        idle = node.blocks[group]
        self._order.revive(idle)
        del self._nodes[idle]
        node.blocks[group] = block
        self._nodes[block] = node
        return idle

    def forget_beyond(self, block: int, count: int) -> None:
        """All but the first ``count`` tokens of ``block`` are about to be overwritten: longer content is forgotten."""
        node = self._nodes.get(block)
        if node is not None and len(node.key) > count * TOKEN_BYTES:
            self._unlink(block)

    def retain(self, block: int, priority: int, seconds: float) -> None:
        """Keep ``block``'s content longer than its turn: for about log2(priority) turns, within ``seconds`` from now."""
        if (node := self._nodes.get(block)) is not None:
            node.priority = max(node.priority, priority)
            node.until = max(node.until, self._clock() + seconds)

    def hold(self, node: Node) -> None:
        node.users += 1

    def drop(self, node: Node) -> None:
        node.users -= 1
        self._prune(node)

    def retire(self, block: int, left: bool = False) -> bool:
        """``block`` has lost its last owner; left: see EvictionOrder. True where it has content, and is idle now."""
        node = self._nodes.get(block)
        if node is None:
            return False
        self._order.retire(node, block, left)
        return True

    def revive(self, block: int) -> None:
        """An idle block has an owner again."""
        self._order.revive(block)

    def found(self, blocks: Iterable[int]) -> None:
        """A prompt begins with what these blocks hold."""
        for block in blocks:
            if (node := self._nodes.get(block)) is not None:
                node.proven = True

    def evict(self) -> int:
        """The idle block whose turn it is; its content is forgotten."""
        block, node = self._order.evict(self._clock())
        first = self._leave(node, block)
        del self._nodes[block]
        if max(node.blocks) < 0:
            node.proven = False
        if self.listener is not None:
            self.listener(BlockEvicted(block, node.number if first else 0))
        if len(node.key) == self.block_size * TOKEN_BYTES and (forgotten := self._order.remember(node)) is not None:
            self._prune(forgotten)
        self._prune(node)
        return block

    def clear(self) -> list[int]:
        """Forget everything; returns the blocks that had content. Holders of nodes have to let go of them first."""
        blocks = list(self._nodes)
        for block, node in self._nodes.items():
            if self._leave(node, block) and self.listener is not None:
                self.listener(BlockRemoved(block, node.number))
        self._nodes.clear()
        self._roots.clear()
        self._order.clear()
        return blocks

    def idle(self) -> Iterable[int]:
        """The idle blocks."""
        return iter(self._order)

    def check(self) -> None:
        """Raises AssertionError unless content is findable exactly where a block holds it."""
        seen = 0
        todo = list(self._roots.values())
        for root in todo:
            assert root.parent is None
            assert max(root.blocks) < 0
        while todo:
            node = todo.pop()
            assert node.keys == sorted(key for key, child in node.children.items() if child.complete), "keys and children differ"
            held = [block for block in node.blocks if block >= 0]
            for block in held:
                seen += 1
                assert self._nodes.get(block) is node, f"content {node.number} is not in block {block}"
            if not held and node.parent is not None:
                assert node.needed, "a ghost that nobody needs"
            whole = len(node.key) == self.block_size * TOKEN_BYTES
            assert node.parent is None or whole or not node.children, "a partly filled block has descendants"
            for key, child in node.children.items():
                assert child.parent is node
                assert child.key == key
                todo.append(child)
        assert seen == len(self._nodes), "content that can't be found"
        assert all(block in self._nodes for block in self._order), "an idle block without content"

    def check_holds(self, tokens: Sequence[int], table: Sequence[int], num_computed: int) -> None:
        """Raises AssertionError unless the published content of a table's blocks is that of the tokens."""
        for at, block in enumerate(table):
            i, group = divmod(at, self.groups.width)
            node = self._nodes.get(block)
            if node is not None:
                assert node.blocks[group] == block, f"block {block} holds another group's content"
                own = encode(tokens[i * self.block_size : min((i + 1) * self.block_size, num_computed)])
                common = min(len(own), len(node.key))
                assert own[:common] == node.key[:common], f"block {block} is published with other tokens than its owner's"

    def _covered(self, parent: Node, key: bytes) -> bool:
        """A child holds all of ``key``, and more."""
        at = bisect_left(parent.keys, key)
        return at < len(parent.keys) and parent.keys[at].startswith(key)

    def _leave(self, node: Node, block: int) -> bool:
        """``node``'s content leaves one of its blocks. True where that was the first group's."""
        assert node.parent is not None
        if node.complete:
            del node.parent.keys[bisect_left(node.parent.keys, node.key)]
        group = node.blocks.index(block)
        node.blocks[group] = -1
        return group == 0

    def _unlink(self, block: int) -> None:
        node = self._nodes.pop(block)
        if self._leave(node, block) and self.listener is not None:
            self.listener(BlockRemoved(block, node.number))
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Forget ``node``, and what is above it, as far as nothing needs it."""
        while not node.needed:
            parent = node.parent
            if parent is None:
                if self._roots.get(node.key) is node:
                    del self._roots[node.key]
                return
            if parent.children.get(node.key) is not node:  # cleared meanwhile
                return
            del parent.children[node.key]
            node = parent

    def _node(self, parent: Node | None, key: bytes, salt: bytes) -> Node:
        self._numbers += 1
        return Node(parent, key, self._numbers, salt, [-1] * self.groups.width)
