"""From a batch to a Step on the device: what attention is cut into, and one copy of everything that the host knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.backends.cuda.batches import Arrays
from quire.backends.cuda.cache import DTYPES
from quire.backends.cuda.decoder import Decoder, Step
from quire.backends.cuda.kernels.attention_configs import LARGEST, decode_config, prefill_config
from quire.backends.cuda.staging import Staging
from quire.backends.cuda.tables import Tables, Updates
from quire.backends.cuda.tiles import SPLIT, DecodeScratch, DecodeTiles, packed_size, prefill_tiles, write_decode_tiles
from quire.core.groups import KVGroups

I32 = npt.NDArray[np.int32]
STAGING = 1 << 20
"""int32 that a step sends to the device at most without taking more memory for it."""
_NOTHING = np.zeros(0, np.int32)
_PADDING = 256
"""More than all arrays of a step take to be aligned."""


@dataclass(slots=True)
class Samples:
    """Of a step's samples, on the device."""

    rows: Tensor
    """[N] int32"""
    lengths: Tensor
    """[N] int32 tokens that each is sampled after."""
    at: Tensor | None = None
    """[N] int32 where each is in the hidden states that are wanted; None where they are the same."""


class Steps:
    """Makes steps for a decoder whose KV pool has ``num_blocks`` blocks of ``block_size`` positions in ``kv_dtype``, for ``groups`` of
    its layers."""

    def __init__(
        self, decoder: Decoder, tables: Tables, *, num_blocks: int, block_size: int, groups: KVGroups, kv_dtype: str, max_len: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        spec = decoder.spec
        self._tables, self._groups, self._device = tables, groups.width, device
        self._windows = sorted({spec.window(i) for i in range(spec.num_layers)})
        group = spec.num_heads // spec.num_kv_heads
        shape = (spec.head_dim, block_size, decoder.dtype, DTYPES[kv_dtype])
        multiprocessors, shared = 1, LARGEST
        if device.type == "cuda":
            from quire.backends.cuda.kernels.launching import shared_memory  # Triton: not elsewhere

            multiprocessors, shared = torch.cuda.get_device_properties(device).multi_processor_count, shared_memory()
        decode = decode_config(*shape, group, tables.spare, shared)
        self._prefill_rows = prefill_config(*shape, shared).rows
        self._programs = decode.programs_per_sm * multiprocessors
        each = -(-max_len // SPLIT)
        held = num_blocks * block_size // max(1, groups.full)  # positions: layers that see everything have a block of each of their groups
        self._splits_of_pool = 2 * -(-held // SPLIT)  # twice: shared blocks are read by several
        self._each = each
        self._heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.scratch = self._make_scratch(tables.spare, self.capacity(tables.spare))
        self._staging = Staging(device, STAGING)

    def capacity(self, sequences: int) -> int:
        """Splits that the lists of captured steps of so many sequences have room for, never more than those of larger ones, which share
        their scratch. Sequences that share very much may have more: their steps are not captured ones."""
        return min(sequences * self._each, 2 * sequences + self._splits_of_pool)

    def fits(self, lengths: I32, sequences: int) -> bool:
        """Whether decoding sequences of these lengths fit into a captured step of ``sequences``."""
        return int((-(-lengths // SPLIT)).sum()) + sequences - len(lengths) <= self.capacity(sequences)

    def stays(self, updates: Updates, sequences: int) -> bool:
        """Whether what a captured step of ``sequences`` reads is at its place, however much a plan changes."""
        lists = len(self._windows) * packed_size(sequences, self.capacity(sequences))
        return updates.size + lists + (3 + self._groups) * sequences + _PADDING <= self._staging.capacity

    def send(self, arrays: Arrays, updates: Updates) -> tuple[Step, Samples]:
        """Any batch."""
        decoding = arrays.num_decoding
        lists = self._decode_lists(arrays.decode_lengths) if decoding else []
        tiles = [_NOTHING] * len(self._windows)
        if len(arrays.prefill_rows):
            tiles = [
                prefill_tiles(arrays.prefill_start, arrays.prefill_lengths, self._prefill_rows, window).astype(np.int32)
                for window in self._windows
            ]
        fields = [
            arrays.positions, arrays.rows, arrays.decode_lengths, arrays.prefill_rows, arrays.prefill_start, arrays.prefill_lengths,
            _NOTHING if arrays.asked is None else arrays.asked, arrays.sampled, arrays.lengths,
            _NOTHING if arrays.sampled_at is None else arrays.sampled_at,
        ]  # fmt: skip
        sent = self._staging.send([*fields, *arrays.slots, *lists, *tiles, *updates.arrays()])
        positions, rows, decode_lengths, prefill_rows, prefill_start, prefill_lengths, asked, sampled, lengths, at = sent[:10]
        slots, sent = sent[10 : 10 + self._groups], sent[10 + self._groups :]
        self._tables.apply(sent[len(lists) + len(tiles) :])
        step = self._decoding(positions, rows, slots, decode_lengths, sent[: len(lists)], self._scratch_for(lists))
        if len(arrays.prefill_rows):
            step.prefill_rows, step.prefill_start, step.prefill_lengths = prefill_rows, prefill_start, prefill_lengths
            there = sent[len(lists) : len(lists) + len(tiles)]
            step.prefill_tiles = {window: each.view(-1, 2) for window, each in zip(self._windows, there, strict=True)}
        if arrays.asked is not None:
            step.asked = asked
        return step, Samples(sampled, lengths, None if arrays.sampled_at is None else at)

    def send_padded(self, arrays: Arrays, updates: Updates, size: int) -> tuple[Step, Samples]:
        """A batch of decoding sequences that are all sampled, padded to ``size`` sequences. All that a step of that size reads is always
        at the same place, so what is captured of it may run on the next one."""
        count = len(arrays.rows)
        fields = np.zeros((3 + self._groups, size), np.int32)
        fields[:3, :count], fields[3:, :count] = (arrays.positions, arrays.rows, arrays.decode_lengths), arrays.slots
        fields[1, count:], fields[3:, count:] = self._tables.spare, -1
        lists = []
        for window in self._windows:
            lists.append(np.zeros(packed_size(size, self.capacity(size)), np.int32))
            write_decode_tiles(lists[-1], fields[2], window)
        sent = self._staging.send([*fields, *lists, *updates.arrays()])
        positions, rows, lengths, *slots = sent[: len(fields)]
        sent = sent[len(fields) :]
        self._tables.apply(sent[len(lists) :])
        step = self._decoding(positions, rows, slots, lengths, sent[: len(lists)], self.scratch)
        return step, Samples(rows, lengths)

    def _decoding(
        self, positions: Tensor, rows: Tensor, slots: list[Tensor], lengths: Tensor, lists: list[Tensor], scratch: DecodeScratch
    ) -> Step:
        """A step whose first sequences have one position each."""
        decoding = len(lengths)
        tiles = {window: DecodeTiles(each, decoding, scratch, self._programs) for window, each in zip(self._windows, lists, strict=False)}
        return Step(
            tokens=self._tables.tokens, rows=rows, positions=positions, slots=slots, tables=self._tables.blocks, num_decoding=decoding,
            decode_rows=rows[:decoding], decode_lengths=lengths, decode_tiles=tiles,
        )  # fmt: skip

    def _decode_lists(self, lengths: I32) -> list[I32]:
        lists = []
        for window in self._windows:
            into = np.zeros(packed_size(len(lengths), int((-(-lengths // SPLIT)).sum()) + len(lengths)), np.int32)
            lists.append(into[: write_decode_tiles(into, lengths, window)])
        return lists

    def _scratch_for(self, lists: list[I32]) -> DecodeScratch:
        """Room for the partial results of a step; more of it where its sequences share so much that they have more splits."""
        most = max((int(each[0]) for each in lists), default=0)
        if most > self.scratch.capacity:
            return self._make_scratch(self._tables.spare, most)
        return self.scratch

    def _make_scratch(self, sequences: int, capacity: int) -> DecodeScratch:
        return DecodeScratch(sequences, capacity, *self._heads, self._device)
