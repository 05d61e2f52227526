"""Paged attention in Triton: one query of each sequence (split over its keys), or many queries of each sequence."""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor

from quire.backends.cuda.cache import LayerKV
from quire.backends.cuda.kernels.attention_configs import decode_config, padded, prefill_config
from quire.backends.cuda.kernels.decode import decode_kernel
from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.launching import shared_memory
from quire.backends.cuda.kernels.prefill import prefill_kernel
from quire.backends.cuda.tiles import SPLIT, DecodeTiles

LOG2_E = log2(e)


def decode(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, lengths: Tensor, tiles: DecodeTiles, scale: float, window: int,
           out: Tensor, sinks: Tensor | None = None, softcap: float = 0.0) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of the same lengths and window; the layer's keys, and values, are contiguous."""
    _, kv_heads, block_size, head_dim = kv.keys.shape
    group = q.shape[1] // kv_heads
    config = decode_config(head_dim, block_size, q.dtype, kv.keys.dtype, group, tiles.sequences, shared_memory())
    scratch = tiles.scratch
    arguments = (
        q, kv.keys, kv.values, kv.key_scales, kv.value_scales, sinks, tables, rows, lengths, tiles.count, tiles.first_slots, tiles.pairs,
        scratch.partial, scratch.maxima, scratch.sums, scratch.arrived, out, scale * LOG2_E, *q.stride()[:2], tables.stride(0),
    )  # fmt: skip
    pairs = kv.values.itemsize == 1 and head_dim % 2 == 0
    fp16 = kv.keys.dtype == torch.float8_e4m3fn and q.dtype == torch.bfloat16
    constants = (
        kv_heads, group, padded(group), head_dim, padded(head_dim), block_size, window, SPLIT, config.tile, INTERPRETED, pairs, fp16,
        softcap * LOG2_E,
    )  # fmt: skip
    if tiles.programs:
        decode_kernel.launch((tiles.programs,), arguments, constants, warps=config.warps, stages=config.stages, registers=config.registers)


def prefill(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor, tiles: Tensor, scale: float,
            window: int, out: Tensor, sinks: Tensor | None = None, softcap: float = 0.0) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of ``prefill_tiles`` with ``prefill_config(...).rows``; the layer's keys, and values, are contiguous."""
    _, kv_heads, block_size, head_dim = kv.keys.shape
    heads = q.shape[1]
    config = prefill_config(head_dim, block_size, q.dtype, kv.keys.dtype, shared_memory())
    arguments = (
        q, kv.keys, kv.values, kv.key_scales, kv.value_scales, sinks, tables, rows, query_start, lengths, tiles, out, scale * LOG2_E,
        *q.stride()[:2], tables.stride(0),
    )  # fmt: skip
    constants = heads, kv_heads, head_dim, padded(head_dim), block_size, window, config.rows, config.tile, INTERPRETED, softcap * LOG2_E
    grid = (tiles.shape[0] * heads,)
    if grid[0]:
        prefill_kernel.launch(grid, arguments, constants, warps=config.warps, stages=config.stages, registers=config.registers)
