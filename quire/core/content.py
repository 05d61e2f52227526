"""Content of blocks: the tokens whose KV a block holds, as a node of the prefix cache's trie."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

TOKEN_BYTES = 4
"""A token is 4 bytes in a node's key."""


@dataclass(slots=True, eq=False)
class Node:
    """The content of one block, and of those that hold the same positions for other groups of layers. ``key`` is shorter than a block's
    where the block is partly filled; such a node is a leaf."""

    parent: Node | None
    key: bytes
    """The block's tokens, encoded; of a root, its salt."""
    number: int
    """Identifies the content in events; never given to another."""
    salt: bytes
    """Of the trie."""
    blocks: list[int]
    """Where the content is: a block for each group of layers, -1 where it is not (a root, a ghost, what left a window)."""
    children: dict[bytes, Node] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)
    """The keys of those ``children`` that are ``complete``, sorted: the longest common beginning is next to where a key would stand."""
    users: int = 0
    """Live sequences whose next block goes below this node."""
    proven: bool = False
    """The content was found again, by a later prompt."""
    remembered: bool = False
    """A ghost that the eviction order remembers."""
    priority: int = 0
    """Of retention; halved each time that it saves the block."""
    until: float = 0.0
    """When the retention ends."""

    @property
    def complete(self) -> bool:
        """All of the content is in blocks."""
        return min(self.blocks) >= 0

    @property
    def needed(self) -> bool:
        """The trie can't do without this node."""
        return max(self.blocks) >= 0 or bool(self.children) or self.users > 0 or self.remembered


def encode(tokens: Iterable[int]) -> bytes:
    """Tokens as the bytes that keys are made of."""
    return array("I", tokens).tobytes()


def decode(key: bytes) -> tuple[int, ...]:
    return tuple(array("I", key))


def common_tokens(a: bytes, b: bytes) -> int:
    """Tokens that two keys begin with in common."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * TOKEN_BYTES] == b[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
