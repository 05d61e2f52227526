"""Paged attention in Triton: one query of each sequence (split over its keys), or many queries of each sequence."""

from __future__ import annotations

from math import e, log2

import torch
from torch import Tensor

from quire.backends.cuda.cache import LayerKV
from quire.backends.cuda.kernels.attention_configs import Config, decode_config, padded, prefill_config
from quire.backends.cuda.kernels.decode import decode_kernel
from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.prefill import prefill_kernel
from quire.backends.cuda.kernels.programmatic import programmatic
from quire.backends.cuda.tiles import SPLIT, DecodeTiles

LOG2_E = log2(e)


def decode(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, lengths: Tensor, tiles: DecodeTiles, scale: float, window: int,
           out: Tensor) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of the same lengths and window; the layer's keys, and values, are contiguous."""
    _, kv_heads, block_size, head_dim = kv.keys.shape
    group = q.shape[1] // kv_heads
    config = decode_config(head_dim, block_size, q.dtype, kv.keys.dtype, group, tiles.sequences)
    scratch = tiles.scratch
    arguments = {
        "queries": q, "keys": kv.keys, "values": kv.values, "key_scales": kv.key_scales, "value_scales": kv.value_scales,
        "tables": tables, "rows": rows, "lengths": lengths, "count": tiles.count, "first_slots": tiles.first_slots, "tiles": tiles.pairs,
        "partial": scratch.partial, "maxima": scratch.maxima, "sums": scratch.sums, "arrived": scratch.arrived, "out": out,
        "scale": scale * LOG2_E, "row_stride": q.stride(0), "head_stride": q.stride(1), "table_width": tables.stride(0),
    }  # fmt: skip
    constants = {
        "KV_HEADS": kv_heads, "GROUP": group, "GROUP_PAD": padded(group), "HEAD_DIM": head_dim, "DIM_PAD": padded(head_dim),
        "BLOCK_SIZE": block_size, "WINDOW": window, "SPLIT": SPLIT, "TILE": config.tile, "UPCAST": INTERPRETED,
        "PDL": programmatic(), "PAIRS": kv.values.itemsize == 1 and head_dim % 2 == 0,
        "FP16": kv.keys.dtype == torch.float8_e4m3fn and q.dtype == torch.bfloat16,
    }  # fmt: skip
    if tiles.programs:
        decode_kernel[(tiles.programs,)](**arguments, **constants, **_options(config), launch_pdl=programmatic())


def prefill(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor, tiles: Tensor, scale: float,
            window: int, out: Tensor) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of ``prefill_tiles`` with ``prefill_config(...).rows``; the layer's keys, and values, are contiguous."""
    _, kv_heads, block_size, head_dim = kv.keys.shape
    heads = q.shape[1]
    config = prefill_config(head_dim, block_size, q.dtype, kv.keys.dtype)
    arguments = {
        "queries": q, "keys": kv.keys, "values": kv.values, "key_scales": kv.key_scales, "value_scales": kv.value_scales,
        "tables": tables, "rows": rows, "query_start": query_start, "lengths": lengths, "tiles": tiles, "out": out,
        "scale": scale * LOG2_E, "row_stride": q.stride(0), "head_stride": q.stride(1), "table_width": tables.stride(0),
    }  # fmt: skip
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "DIM_PAD": padded(head_dim), "BLOCK_SIZE": block_size,
        "WINDOW": window, "ROWS": config.rows, "TILE": config.tile, "UPCAST": INTERPRETED,
    }  # fmt: skip
    if len(tiles):
        prefill_kernel[(len(tiles) * heads,)](**arguments, **constants, **_options(config))


def _options(config: Config) -> dict[str, int | None]:
    return {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers}
