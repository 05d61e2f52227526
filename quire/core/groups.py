"""KVGroups: which layers' keys and values stand in one block, and how far each of them looks back.

    a model of 12 layers, of which every third sees everything, and 8 see a window:   groups of 4 layers

    group 0   full       layers 2, 5, 8, 11     17   4   9   6   3     one sequence's block table: for each ``block_size`` positions
    group 1   windowed   layers 0, 1, 3, 4       .   .   .   2  11     a block of each group; what a window has left behind was
    group 2   windowed   layers 6, 7, 9, 10      .   .   .   8  12     given back

All blocks are of one size and come from one pool, so memory goes to whatever needs it. Where all layers see equally far there is one
group of all of them, and a block holds the positions of every layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class KVGroups:
    """``full`` groups of layers that see everything, then ``windowed`` ones of which a query sees the last ``window`` positions."""

    full: int = 1
    windowed: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        assert self.full + self.windowed > 0, "a model has layers"
        assert (self.windowed > 0) == (self.window > 0), "a window belongs to windowed groups, and they to it"

    @property
    def width(self) -> int:
        """Blocks that hold ``block_size`` positions of a sequence: one of each group."""
        return self.full + self.windowed

    def first_visible(self, position: int) -> int:
        """The first position that the last of ``position`` computed ones sees in the windowed groups, or any later one: it may be computed
        again."""
        return max(0, position - self.window) if self.windowed else 0

    def num_trimmed(self, table: list[int]) -> int:
        """Logical blocks of a sequence's block table that windows have left behind."""
        return table.count(-1) // self.windowed if self.windowed else 0

    def blocks(self, positions: int, block_size: int, step: int = 1) -> int:
        """Blocks that a sequence of ``positions`` holds at most, where a step computes up to ``step`` of them: of windowed groups those
        in sight of the step's first position, and those that it writes."""
        whole = -(-positions // block_size)
        if not self.windowed:
            return self.full * whole
        return self.full * whole + self.windowed * min(whole, self.most_windowed(block_size, step))

    def most_windowed(self, block_size: int, step: int) -> int:
        """Blocks of one windowed group that a sequence holds at most: a window's, the one that the step's first position is in, and those
        of its other positions. Blocks are given back when a block is full."""
        return -(-self.window // block_size) + 1 + -(-(step - 1) // block_size)

    def positions(self, blocks: int, block_size: int, step: int = 1) -> int:
        """The longest sequence for which ``blocks`` are enough, see ``blocks``. Where all groups have a window, any length may fit: then
        what they hold at a time."""
        fits, fails = 0, blocks * block_size // (self.full or self.windowed) + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.blocks(middle, block_size, step) <= blocks:
                fits = middle
            else:
                fails = middle
        return fits


ONE_GROUP = KVGroups()
"""All layers see everything."""
