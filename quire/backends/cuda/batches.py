"""What a step is made of, as arrays for one copy to the device. Sequences with one position come first: they have kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.backends.rows import Batch
from quire.core.plan import RowWork

I32 = npt.NDArray[np.int32]


def decoding_first(
    work: Sequence[RowWork], num_prompt: npt.NDArray[np.int64] | None = None
) -> tuple[list[RowWork], int, npt.NDArray[np.int64] | None]:  # fmt: skip
    """The work with that of one position first, how much that is, and where in its samples the plan's i-th is, None where nothing has
    moved. num_prompt: of each row, where positions of its prompt count as several even alone, so that how it is cut changes no bits."""
    first: list[RowWork] = []
    others: list[RowWork] = []
    for w in work:
        decodes = w.count == 1 and (num_prompt is None or w.start >= num_prompt[w.row])
        (first if decodes else others).append(w)
    ordered = first + others
    if all(a is b for a, b in zip(ordered, work, strict=True)):
        return ordered, len(first), None
    at, begin = {}, 0
    for w in ordered:
        at[id(w)] = begin
        begin += 1 + len(w.draft) if w.sample else 0
    order = [at[id(w)] + i for w in work if w.sample for i in range(1 + len(w.draft))]
    return ordered, len(first), np.array(order, np.int64)


@dataclass(slots=True)
class Arrays:
    """A batch of T positions, of which the first D are those of sequences with one each, and P sequences have the others."""

    positions: I32
    """[T]"""
    rows: I32
    """[T] the row of each position."""
    slots: I32
    """[groups, T] see decoder.Step."""
    decode_lengths: I32
    """[D]"""
    prefill_rows: I32
    """[P]"""
    prefill_start: I32
    """[P + 1]"""
    prefill_lengths: I32
    """[P]"""
    asked: I32 | None
    """[A] the positions whose hidden states are wanted; None where that is all of them."""
    sampled: I32
    """[N] the row of each sample."""
    lengths: I32
    """[N] tokens that it is sampled after."""
    sampled_at: I32 | None
    """[N] where in the hidden states that are wanted each is; None where they are the same."""

    @property
    def num_decoding(self) -> int:
        return len(self.decode_lengths)


def arrange(batch: Batch, decoding: int, block_size: int) -> Arrays:
    """Of a batch whose work is ``decoding_first``; ``decoding``: how much of it."""
    counts = np.diff(batch.query_start)
    rows = batch.rows if decoding == len(counts) else np.repeat(batch.rows, counts)
    slots = batch.block_tables[:, rows, batch.positions // block_size] * block_size + batch.positions % block_size
    if batch.written is not None:
        written = np.zeros(len(rows), bool)
        written[batch.written.tokens] = True
        slots[:, ~written] = -1
    return Arrays(
        positions=batch.positions,
        rows=rows,
        slots=slots,
        decode_lengths=batch.start[:decoding] + 1,
        prefill_rows=batch.rows[decoding:],
        prefill_start=batch.query_start[decoding:] - decoding,
        prefill_lengths=batch.start[decoding:] + counts[decoding:],
        asked=None if batch.asked is None else batch.asked.tokens,
        sampled=batch.sampled,
        lengths=batch.lengths.astype(np.int32),
        sampled_at=None if batch.scored is None else batch.scored.sampled_at,
    )


def no_arrays(groups: int) -> Arrays:
    """Of nobody."""
    nothing, slots = np.zeros(0, np.int32), np.zeros((groups, 0), np.int32)
    return Arrays(nothing, nothing, slots, nothing, nothing, np.zeros(1, np.int32), nothing, None, nothing, nothing, None)
