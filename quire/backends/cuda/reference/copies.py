"""Whole blocks of the KV pool."""

from __future__ import annotations

from torch import Tensor

from quire.backends.cuda.cache import KVPool


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copy blocks in all layers, within the memory of a pool, or between it and other memory on the device.

    source, destination [layers, 2, blocks, ...] of one dtype: a block of a layer, and layers by twos, are contiguous. pairs [N, 2] int32:
    (block of source, block of destination), in any order. Where the memory is the same, no destination is the source or the
    destination of another pair (see ``hazard_free``).
    """
    from_, to = pairs.long().unbind(1)
    destination[:, :, to] = source[:, :, from_]


def fill_blocks(pool: KVPool, blocks: Tensor, value: float) -> None:
    """Fill blocks [N] int32 in all layers; where there are scales, these only. With NaN, what reads a block that nobody wrote shows."""
    memory = pool.data if pool.scales is None else pool.scales
    memory.index_fill_(2, blocks.long(), value)
