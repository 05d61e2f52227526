"""What the device keeps of each row from step to step: its tokens, its block tables, its sampling parameters.

Sampled tokens are put into the table by the device itself, so that the next step can be queued before the host has read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.backends.parameters import FLOATS, Parameters
from quire.core.plan import RowStart, RowWork

I32 = npt.NDArray[np.int32]

SEED, PROMPT, TOP_K, FIRST_FLOAT = 0, 2, 3, 4
"""Columns of ``parameters``; the seed takes two, and the floats follow in the order of FLOATS."""
_WIDTH = FIRST_FLOAT + len(FLOATS)
_ALIGN = 4
"""int32 in 16 bytes."""


class Tables:
    """One row more than there are: what a captured step does for rows that are not there goes into the last one."""

    def __init__(self, num_rows: int, max_len: int, block_size: int, groups: int, device: torch.device) -> None:
        """groups: of layers, see core/groups.py."""
        self.spare = num_rows
        self.tokens = torch.zeros((num_rows + 1, max_len + 1), dtype=torch.int32, device=device)
        width = -(-max_len // block_size)
        width = -(-width // _ALIGN) * _ALIGN  # the next group's table is aligned too: kernels are compiled for that
        self._blocks = torch.zeros((groups * (num_rows + 1), width), dtype=torch.int32, device=device)
        """The tables of each group, one group below the other."""
        self.blocks = self._blocks.split(num_rows + 1)
        """Of each group, [rows, blocks]."""
        self.parameters = torch.zeros((num_rows + 1, _WIDTH), dtype=torch.int32, device=device)
        """float32 ones bit for bit."""

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self._blocks.nbytes + self.parameters.nbytes

    def apply(self, updates: Sequence[Tensor]) -> None:
        """What ``Updates.arrays`` became on the device."""
        token_at, tokens, block_at, blocks, rows, parameters = updates
        for table, at, values in ((self.tokens, token_at, tokens), (self._blocks, block_at, blocks)):
            if len(at):
                row, column = at.view(2, -1).unbind()
                table.index_put_((row, column), values)
        if len(rows):
            self.parameters.index_copy_(0, rows.long(), parameters.view(-1, _WIDTH))


class Updates:
    """What a plan changes in ``tables``."""

    def __init__(
        self, tables: Tables, starts: Sequence[RowStart], work: Sequence[RowWork], lengths: npt.NDArray[np.int64], parameters: Parameters
    ) -> None:
        """lengths: tokens of each row, the plan's starts included. parameters: the same."""
        self._groups, self._table_rows = len(tables.blocks), tables.spare + 1
        self._tokens: list[tuple[int, int, Sequence[int]]] = [(start.row, 0, start.tokens) for start in starts]
        self._blocks: list[tuple[int, int, Sequence[int]]] = []
        for w in work:
            if w.tokens:
                self._tokens.append((w.row, int(lengths[w.row]), w.tokens))
            if w.draft:
                self._tokens.append((w.row, int(lengths[w.row]) + len(w.tokens), w.draft))
            if w.new_blocks:
                self._blocks.append((w.row, w.first_block * self._groups, w.new_blocks))
        self._starts, self._parameters = starts, parameters

    @property
    def size(self) -> int:
        """At least the int32 of all ``arrays``."""
        cells = sum(len(values) for _, _, values in self._tokens) + sum(len(values) for _, _, values in self._blocks)
        return 3 * cells + (1 + _WIDTH) * len(self._starts)

    def arrays(self) -> list[I32]:
        """For one copy to the device, see Tables.apply."""
        block_at, blocks = _cells(self._blocks)
        block_at[1], group = np.divmod(block_at[1], self._groups)  # they are side by side in a plan
        block_at[0] += group * self._table_rows
        return [*_cells(self._tokens), block_at, blocks, *self._rows()]

    def _rows(self) -> tuple[I32, I32]:
        rows = np.array([start.row for start in self._starts], np.int32)
        values = np.zeros((len(rows), _WIDTH), np.int32)
        if len(rows):
            parameters = self._parameters
            values[:, SEED : SEED + 2] = parameters.seed[rows].view(np.int32).reshape(-1, 2)
            values[:, PROMPT] = [start.num_prompt for start in self._starts]
            values[:, TOP_K] = parameters.top_k[rows]
            for i, name in enumerate(FLOATS):
                values[:, FIRST_FLOAT + i] = parameters.floats[name][rows].view(np.int32)
        return rows, values


def _cells(stretches: Sequence[tuple[int, int, Sequence[int]]]) -> tuple[I32, I32]:
    """(rows and columns [2, n], values [n]) of (row, first column, values)."""
    counts = [len(values) for _, _, values in stretches]
    at = np.zeros((2, sum(counts)), np.int32)
    found = np.zeros(sum(counts), np.int32)
    end = 0
    for (row, column, values), count in zip(stretches, counts, strict=True):
        begin, end = end, end + count
        at[0, begin:end] = row
        at[1, begin:end] = np.arange(column, column + count)
        found[begin:end] = values
    return at, found
