"""Whole blocks of the KV pool, as bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.reference.copies import fill_blocks  # for debugging only: as it is

__all__ = ["copy_blocks", "fill_blocks"]

CHUNK = 8192
"""Bytes that a program copies."""


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """As in reference/. pairs is contiguous."""
    layers, two = source.shape[:2]
    size = source[0, 0, 0].nbytes
    chunk = min(CHUNK, triton.next_power_of_2(size))
    grid = (pairs.shape[0], triton.cdiv(size, chunk), layers * two)
    _copy.launch(grid, (*_strided(source), *_strided(destination), pairs), (size, chunk))


def _strided(memory: Tensor) -> tuple[Tensor, int, int]:
    """Bytes from the first of ``memory`` on, how many there are from a layer's keys or values to the next, and from a block to the next."""
    assert memory.stride(0) == memory.shape[1] * memory.stride(1)
    assert memory[0, 0, 0].is_contiguous()
    size = memory.element_size()
    flat = memory.as_strided((1,), (1,)).view(torch.uint8)
    return flat, memory.stride(1) * size, memory.stride(2) * size


@Kernel
@triton.jit
def _copy(source, SOURCE_LAYER, SOURCE_BLOCK, destination, TO_LAYER, TO_BLOCK, pairs, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    layer = tl.program_id(2).to(tl.int64)
    source += layer * SOURCE_LAYER + tl.load(pairs + 2 * tl.program_id(0)).to(tl.int64) * SOURCE_BLOCK
    destination += layer * TO_LAYER + tl.load(pairs + 2 * tl.program_id(0) + 1).to(tl.int64) * TO_BLOCK
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    tl.store(destination + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)
