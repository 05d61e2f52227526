"""Needs: free blocks that a sequence takes until all its known tokens are computed. Queries alone; nothing is set aside by asking."""

from __future__ import annotations

from quire.core.block_pool import BlockPool
from quire.core.groups import KVGroups
from quire.core.prefix_cache import Match
from quire.core.sequence import Sequence


class Needs:
    """Of sequences in ``pool``. step: positions that a step computes at most, where groups have a window."""

    def __init__(self, pool: BlockPool, block_size: int, groups: KVGroups, step: int) -> None:
        self._counts = pool.ref_counts
        self._block_size = block_size
        self._groups = groups
        self._width = groups.width
        self._step = step

    def start(self, seq: Sequence, match: Match) -> int:
        """If it starts with ``match``."""
        have, trimmed = len(match.blocks) // self._width, self._groups.num_trimmed(match.blocks)
        return self._to_come(seq.num_tokens, have, trimmed) + self._revived(match)

    def at_once(self, match: Match) -> int:
        """Those of them that it takes before anything is computed: idle ones that have its content, and copies of what fits in part."""
        return self._revived(match) + self._width * (match.tail is not None)

    def fork(self, seq: Sequence) -> int:
        """If it starts as a fork at the end of its prompt; one logical block is for the copy of the partly filled one."""
        whole, part = divmod(seq.num_prompt, self._block_size)
        trimmed = self._groups.first_visible(seq.num_prompt) // self._block_size
        return self._to_come(seq.num_tokens, whole + (part > 0), trimmed) + self._width * (part > 0)

    def rest(self, seq: Sequence, num_positions: int | None = None) -> int:
        """Of one that runs; or until ``num_positions`` are computed."""
        return self._to_come(num_positions or len(seq.tokens), len(seq.block_table) // self._width, seq.num_trimmed)

    def shared(self, match: Match) -> int:
        """Logical blocks of ``match`` that have an owner already, or that the window has left behind: they cost nothing."""
        return sum(block < 0 or self._counts[block] > 0 for block in match.blocks[:: self._width])

    def _revived(self, match: Match) -> int:
        return sum(block >= 0 and self._counts[block] == 0 for block in match.blocks)

    def _to_come(self, num_positions: int, have: int, trimmed: int) -> int:
        """Up to ``num_positions``, with ``have`` logical blocks of which windows have left ``trimmed``."""
        groups, size = self._groups, self._block_size
        more = -(-num_positions // size) - have
        blocks = groups.full * more
        if groups.windowed:  # it never has more of them at a time than the longest of its steps needs
            most = groups.most_windowed(size, min(self._step, (more + 1) * size))
            blocks += groups.windowed * max(0, min(more, most - (have - trimmed)))
        return blocks
