"""The backend's rows: tokens, block tables and sampling parameters of the running sequences, as arrays.

A plan names rows and what is new for them; these tables hold the rest, so that a step costs in proportion to the rows that
run in it, not to the lengths of their sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.plan import RowStart, RowWork, StepPlan, accepted

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Batch:
    """The positions that one step computes: S rows, T positions in all."""

    rows: I32
    """[S] row of each sequence in the plan's order."""
    query_start: I32
    """[S + 1] first of its positions among the T."""
    start: I32
    """[S] absolute position of its first one."""
    positions: I32
    """[T] absolute positions."""
    ids: I32
    """[T] tokens at those positions."""
    block_tables: I32
    """[groups, rows, blocks] the tables of all rows, of each group of layers."""
    sampled: I32
    """[samples] the row of each."""
    lengths: I64
    """[samples] tokens that each is sampled after: those that the row has, and of its draft those up to there."""
    drafts: bool = False
    """Some rows have guessed tokens."""
    written: Part | None = None
    """The positions whose KV is not in the blocks yet and is written; None for all of them."""
    asked: Part | None = None
    """The positions whose hidden states are wanted at the end; None for all of them."""
    scored: Scored | None = None
    """Some positions are scored; None where those that are asked for are just the ``sampled`` ones."""
    uniform: bool = False
    """One position of each sequence, written and sampled. Its positions are its starts."""

    @property
    def whole(self) -> bool:
        """Every position is written and asked for, none is scored: from the next such batch of as many rows and positions this one
        differs by what ``contents`` hold alone."""
        return self.written is None and self.asked is None and self.scored is None

    def contents(self) -> tuple[I32, ...]:
        """What a whole batch has of its own, and its forward pass looks at."""
        own = self.rows, self.start, self.ids
        return own if self.uniform else (*own, self.positions, self.query_start)

    def copy(self) -> Batch:
        """A whole batch with the same contents in arrays of its own."""
        rows, start, ids, *others = (array.copy() for array in self.contents())
        positions, query_start = others or (start, self.query_start)
        return replace(self, rows=rows, start=start, ids=ids, positions=positions, query_start=query_start)


@dataclass(slots=True)
class Scored:
    """Of a batch in which positions are scored: what is where among the hidden states that are asked for."""

    sampled_at: I32
    """[samples]"""
    rows: list[tuple[int, range, int]]
    """(row, its positions that are scored, where the first of them is)"""


@dataclass(slots=True)
class Part:
    """Some of a batch's positions."""

    tokens: I32
    """Which of the T positions."""
    rows: I32
    query_start: I32
    start: I32
    """As in Batch."""


class Rows:
    """Tables of ``num_rows`` rows of at most ``max_len`` tokens. groups: of the model's layers (core/groups.py)."""

    def __init__(self, num_rows: int, max_len: int, block_size: int, groups: int = 1) -> None:
        # Zeroed memory is not touched before it is written: long contexts cost nothing until they are used.
        self.tokens = np.zeros((num_rows, max_len + 1), np.int32)
        self.lengths = np.zeros(num_rows, np.int64)
        self.num_prompt = np.zeros(num_rows, np.int64)
        self.block_tables = np.zeros((groups, num_rows, -(-max_len // block_size)), np.int32)
        self.starts: list[RowStart | None] = [None] * num_rows
        self._counter = np.arange(num_rows + 1, dtype=np.int32)

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        row, count = start.row, len(start.tokens)
        self.tokens[row, :count] = start.tokens
        self.lengths[row] = count
        self.num_prompt[row] = start.num_prompt
        self.starts[row] = start

    def batch(self, work: list[RowWork]) -> Batch:
        """Put the plan's new blocks and tokens into the tables, and lay out its positions."""
        decode, drafts = True, False
        for w in work:
            decode = decode and w.sample and w.write and not w.score and w.count == 1 + len(w.draft)
            if w.new_blocks:
                blocks = np.array(w.new_blocks, np.int32).reshape(-1, len(self.block_tables)).T
                self.block_tables[:, w.row, w.first_block : w.first_block + blocks.shape[1]] = blocks
            if w.tokens:
                length = self.lengths[w.row]
                self.tokens[w.row, length : length + len(w.tokens)] = w.tokens
                self.lengths[w.row] = length + len(w.tokens)
            if w.draft:  # beyond the row's length: not its own yet
                length = self.lengths[w.row]
                self.tokens[w.row, length : length + len(w.draft)] = w.draft
                drafts = True
        rows = np.array([w.row for w in work], np.int32)
        start = np.array([w.start for w in work], np.int32)
        if decode and not drafts:  # the step that comes most often: one position of each row, and all are sampled
            ids, query_start = self.tokens[rows, start], self._counter[: len(work) + 1]
            return Batch(rows, query_start, start, start, ids, self.block_tables, rows, self.lengths[rows], uniform=True)
        counts = np.array([w.count for w in work], np.int32)
        query_start = np.zeros(len(work) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        of = np.repeat(np.arange(len(work)), counts)
        before = np.arange(query_start[-1], dtype=np.int32) - query_start[of]
        row_of, positions = rows[of], start[of] + before
        ids = self.tokens[row_of, positions]
        if decode:  # the next token of each row and its draft, and all are sampled
            return Batch(rows, query_start, start, positions, ids, self.block_tables, row_of, self.lengths[row_of] + before, drafts=True)
        sample = np.array([w.sample for w in work], bool)
        sampled, logit_rows = rows[sample], query_start[1:][sample] - 1
        lengths = self.lengths[sampled]
        if drafts:
            guessed = np.array([len(w.draft) for w in work if w.sample], np.int32)
            # 0, 1, ... for each row: how many tokens of its draft are before the sampled one.
            ahead = np.concatenate([np.arange(count + 1, dtype=np.int32) for count in guessed])
            sampled, logit_rows, lengths = (np.repeat(a, guessed + 1) for a in (sampled, logit_rows - guessed, lengths))
            logit_rows, lengths = logit_rows + ahead, lengths + ahead
        batch = Batch(rows, query_start, start, positions, ids, self.block_tables, sampled, lengths, drafts)
        if not all(w.write for w in work):
            write = np.array([w.write for w in work], bool)
            batch.written = _part(batch, np.flatnonzero(np.repeat(write, counts)), write, np.where(write, counts, 0), start)
        asked = np.array([_num_asked(w) for w in work], np.int32)
        wanted = logit_rows
        if any(w.score for w in work):
            wanted = np.concatenate(
                [np.arange(end - count, end, dtype=np.int32) for count, end in zip(asked, query_start[1:], strict=True)]
            )
            begin = np.cumsum(asked) - asked
            at = [(w.row, w.score, int(i)) for w, i in zip(work, begin, strict=True) if w.score]
            batch.scored = Scored(np.searchsorted(wanted, logit_rows).astype(np.int32), at)
        if len(wanted) < len(ids):
            batch.asked = _part(batch, wanted, asked > 0, asked, start + counts - asked)
        return batch

    def append(self, rows: I32, tokens: npt.NDArray[Any]) -> None:
        """Each of ``rows`` grew by one sampled token."""
        self.tokens[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1

    def append_accepted(
        self, work: list[RowWork], tokens: list[int], beams: npt.NDArray[np.bool_], starts: Sequence[RowStart | None] = ()
    ) -> None:
        """Each row that was sampled grew by what counts of its ``tokens``; beams by nothing. ``starts``: of the work's rows when the step
        was launched, where another sequence may have taken a row since, and those without a draft have grown already."""
        at = 0
        for i, w in enumerate(work):
            if not w.sample:
                continue
            sampled = tokens[at : at + 1 + len(w.draft)]
            at += len(sampled)
            if not beams[w.row] and (not starts or (w.draft and starts[i] is self.starts[w.row])):
                count, length = accepted(w.draft, sampled), self.lengths[w.row]
                self.tokens[w.row, length : length + count] = np.maximum(sampled[:count], 0)
                self.lengths[w.row] = length + count


def fresh_blocks(plan: StepPlan, block_size: int, groups: int = 1) -> list[int]:
    """Blocks that this step begins to write. groups: of the model's layers (core/groups.py)."""
    copied = {destination for _, destination in plan.copies}
    fresh = []
    for work in plan.work:
        first = -(-work.start // block_size)  # a block that holds earlier positions was written before
        begin = max(0, first - work.first_block) * groups
        fresh += [block for block in work.new_blocks[begin:] if work.write and block not in copied]
    return fresh


def _num_asked(work: RowWork) -> int:
    """How many of the last positions have hidden states that somebody reads, or that lie behind one that somebody reads."""
    if work.score:
        return work.start + work.count - work.score.start
    return 1 + len(work.draft) if work.sample else 0


def _part(batch: Batch, tokens: npt.NDArray[Any], of: npt.NDArray[np.bool_], counts: I32, start: I32) -> Part:
    """``tokens`` of the positions: ``counts`` of each row that is one ``of`` them, from ``start``."""
    query_start = np.zeros(int(of.sum()) + 1, np.int32)
    np.cumsum(counts[of], out=query_start[1:])
    return Part(tokens.astype(np.int32), batch.rows[of], query_start, start[of])
