"""What attention is cut into: lists of tiles, made on the host once a step and shared by all layers.

A list says who computes what, and never changes a result: splits and tiles of keys lie at absolute positions, so a row's result depends
on its own length only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SPLIT = 256
"""Keys of a split of a decoding sequence, but for the last one, which has half of it to half of it more: a sequence of few keys is not
divided, and none has a split of a few keys. A part of the arithmetic: partial results are merged where splits meet."""
HEADER = 4
"""int32 in front of a decode list: the number of tiles, and padding."""

I32 = npt.NDArray[np.int32]


def _aligned(count: int) -> int:
    """Whole 16 bytes: Triton compiles a kernel again for pointers that are aligned otherwise."""
    return -(-count // 4) * 4


def packed_size(sequences: int, capacity: int) -> int:
    """int32 of a decode list of up to ``capacity`` tiles; whole 16 bytes."""
    return _aligned(HEADER + _aligned(sequences) + 2 * capacity)


def count_splits(lengths: I32, window: int) -> tuple[I32, I32]:
    """The first split of each sequence that the last position sees, and how many there are from there on: at least 1, of an empty
    sequence too, for its output must be written."""
    splits = np.maximum((lengths + SPLIT // 2 - 1) // SPLIT, 1)
    first = np.minimum(np.maximum(lengths - window, 0) // SPLIT, splits - 1) if window else np.zeros_like(lengths)
    return first, splits - first


def write_decode_tiles(into: I32, lengths: I32, window: int = 0) -> int:
    """The decode list of a step → ``into``, a part of what goes to the device in one copy (see DecodeTiles). Returns the int32 in use.

    lengths: [S] keys of each sequence, 0 for padding. Raises ValueError where ``into`` is too short. Whole splits come first: the last
    round of programs, which may be short of work, gets the short ones. Of them all first splits, then all second ones, ...: splits of
    one sequence that end together would all be merged by programs that others wait for.
    """
    sequences = len(lengths)
    first, splits = count_splits(lengths, window)
    ends = np.cumsum(splits, dtype=np.int32)
    total = int(ends[-1]) if sequences else 0
    start = HEADER + _aligned(sequences)
    used = start + 2 * total
    if used > len(into):
        raise ValueError(f"{total} tiles of {sequences} sequences need {used} numbers, there are {len(into)}")
    into[0] = total
    into[HEADER : HEADER + sequences] = ends - splits
    sequence = np.repeat(np.arange(sequences, dtype=np.int32), splits)
    split = np.arange(total, dtype=np.int32) - np.repeat(ends - splits - first, splits)
    keys = np.where(split + 1 == (first + splits)[sequence], lengths[sequence] - split * SPLIT, SPLIT)
    order = np.lexsort((split, keys < SPLIT))
    tiles = into[start:used].reshape(total, 2)
    tiles[:, 0] = sequence[order]
    tiles[:, 1] = split[order]
    return used


class DecodeScratch:
    """Partial results of splits, on the device; made once, for all layers and steps.

    capacity: tiles of the largest step: for each sequence its keys / SPLIT, rounded up. It takes
    ``capacity * heads * (head_dim + 2) * 4`` bytes.
    """

    def __init__(self, sequences: int, capacity: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.sequences, self.capacity = sequences, capacity
        self.partial = torch.empty((capacity, heads, head_dim), dtype=torch.float32, device=device)
        """Weighted sums of values, each split relative to its own largest score."""
        self.maxima = torch.empty((capacity, heads), dtype=torch.float32, device=device)
        """Largest scores, in powers of 2."""
        self.sums = torch.empty((capacity, heads), dtype=torch.float32, device=device)
        """Sums of weights."""
        self.arrived = torch.zeros((sequences, kv_heads), dtype=torch.int32, device=device)
        """Splits that are done; 0 between launches, since whoever merges them clears it."""

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (self.partial, self.maxima, self.sums, self.arrived))


@dataclass(slots=True)
class DecodeTiles:
    """The decode list of a step on the device. Two windows in a model make two lists over one scratch."""

    packed: Tensor
    """[packed_size(sequences, ...)] int32, as ``write_decode_tiles`` laid it out: the number of tiles, for each sequence its first slot
    in the scratch, and (sequence, split) of each tile. Starts at whole 16 bytes. Read on the device only, so that a captured graph
    serves all lengths."""
    sequences: int
    """Of the launch, padding included."""
    scratch: DecodeScratch
    programs: int
    """Of the launch: as many as run at the same time (decode_config(...).programs_per_sm for each multiprocessor). They stride over the
    list."""

    @property
    def count(self) -> Tensor:
        """[1] int32."""
        return self.packed[:1]

    @property
    def first_slots(self) -> Tensor:
        """[sequences] int32."""
        return self.packed[HEADER : HEADER + self.sequences]

    @property
    def pairs(self) -> Tensor:
        """[...] int32: sequence, split, sequence, split, ..."""
        return self.packed[HEADER + _aligned(self.sequences) :]


def prefill_tiles(query_start: I32, lengths: I32, rows: int, window: int = 0) -> I32:
    """[N, 2] int32: (sequence, index of its tile of ``rows`` queries), those that see the most keys first, so that the last programs to
    start are short.

    query_start: [S + 1] where each sequence's queries begin; they are the last of its ``lengths[s]`` keys. rows: of
    ``prefill_config``.
    """
    counts = np.diff(query_start)
    tiles = -(-counts // rows)
    sequence = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
    index = np.arange(len(sequence), dtype=np.int32) - np.repeat(np.cumsum(tiles) - tiles, tiles).astype(np.int32)
    first = (lengths - counts)[sequence] + index * rows
    keys = np.minimum(first + rows, lengths[sequence])
    if window:
        keys -= np.maximum(first - window + 1, 0)
    order = np.argsort(-keys, kind="stable")
    return np.stack([sequence[order], index[order]], 1)
