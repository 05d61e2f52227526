"""Whole blocks of the KV pool."""

from __future__ import annotations

from torch import Tensor

from quire.backends.cuda.cache import KVPool


def copy_blocks(pool: KVPool, pairs: Tensor) -> None:
    """Copy blocks in all layers: keys, values and scales.

    pairs [N, 2] int32: (source, destination), in any order: no destination is the source or the destination of another pair (see
    ``hazard_free``).
    """
    source, destination = pairs.long().unbind(1)
    for memory in (pool.data, pool.scales):
        if memory is not None:
            memory[:, :, destination] = memory[:, :, source]


def fill_blocks(pool: KVPool, blocks: Tensor, value: float) -> None:
    """Fill blocks [N] int32 in all layers; where there are scales, these only. With NaN, what reads a block that nobody wrote shows."""
    memory = pool.data if pool.scales is None else pool.scales
    memory.index_fill_(2, blocks.long(), value)
