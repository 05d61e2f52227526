"""The KV pool on the device, and the view of it that a layer's operations take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""What keys and values may be kept in. int8 and fp8 (e4m3) have a float16 scale beside each head's key, and value, of a token: the
largest element of it is the largest number of the type."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of the types with scales, the number that the largest element becomes."""


@dataclass(slots=True)
class LayerKV:
    """Keys and values of one layer. The positions of a block are contiguous, for each head by itself: a tile of keys is one stretch."""

    keys: Tensor
    """[num_blocks, kv_heads, block_size, head_dim]"""
    values: Tensor
    key_scales: Tensor | None
    """[num_blocks, kv_heads, block_size] float16, where keys and values are int8 or fp8: what the stored numbers are to be multiplied
    by."""
    value_scales: Tensor | None


class KVPool:
    """As many layers as a block has room for, in one allocation (and one for the scales), so that a copy of a block is one launch, and a
    size one number."""

    def __init__(self, num_layers: int, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: str, device: torch.device,
                 pinned: bool = False) -> None:  # fmt: skip
        """Zeroed memory; ``pinned``: of the host, for swapping."""
        shape = (num_layers, 2, num_blocks, kv_heads, block_size)
        self.data = torch.zeros((*shape, head_dim), dtype=DTYPES[dtype], device=device, pin_memory=pinned)
        """[layers, 2, num_blocks, kv_heads, block_size, head_dim]; of the 2, keys come first."""
        self.scales: Tensor | None = None
        """[layers, 2, num_blocks, kv_heads, block_size]"""
        if DTYPES[dtype] in LARGEST:
            self.scales = torch.zeros(shape, dtype=torch.float16, device=device, pin_memory=pinned)

    @property
    def memories(self) -> list[Tensor]:
        """All that a block is copied in."""
        return [self.data] if self.scales is None else [self.data, self.scales]

    def layer(self, index: int) -> LayerKV:
        scales = (None, None) if self.scales is None else (self.scales[index, 0], self.scales[index, 1])
        return LayerKV(self.data[index, 0], self.data[index, 1], *scales)
