"""Whole blocks of the KV pool, as bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.cache import KVPool
from quire.backends.cuda.reference.copies import fill_blocks  # for debugging only: as it is

__all__ = ["copy_blocks", "fill_blocks"]

CHUNK = 8192
"""Bytes that a program copies."""


def copy_blocks(pool: KVPool, pairs: Tensor) -> None:
    """As in reference/. pairs is contiguous."""
    for memory in (pool.data, pool.scales):
        if memory is not None:
            layers, two, num_blocks = memory.shape[:3]
            data = memory.view(-1).view(torch.uint8)
            size = data.shape[0] // (layers * two * num_blocks)
            chunk = min(CHUNK, triton.next_power_of_2(size))
            grid = (pairs.shape[0], triton.cdiv(size, chunk), layers * two)
            _copy[grid](data, pairs, num_blocks, size, chunk, num_warps=4)


@triton.jit
def _copy(data, pairs, NUM_BLOCKS, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    source = tl.load(pairs + 2 * tl.program_id(0)).to(tl.int64)
    destination = tl.load(pairs + 2 * tl.program_id(0) + 1).to(tl.int64)
    data += tl.program_id(2).to(tl.int64) * NUM_BLOCKS * SIZE
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    tl.store(data + destination * SIZE + at, tl.load(data + source * SIZE + at, mask=at < SIZE), mask=at < SIZE)
