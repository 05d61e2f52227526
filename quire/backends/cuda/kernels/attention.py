"""Paged attention in Triton: one query of each sequence (split over its keys), or many queries of each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2
from typing import Any

from torch import Tensor

from quire.backends.cuda.cache import LayerKV
from quire.backends.cuda.kernels.attention_configs import Config, decode_config, padded, prefill_config
from quire.backends.cuda.kernels.decode import decode_kernel
from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.prefill import prefill_kernel
from quire.backends.cuda.tiles import SPLIT, DecodeTiles

LOG2_E = log2(e)


@dataclass(slots=True)
class Launch:
    """A kernel with all that it is given. The tests compile it as the launch would."""

    kernel: Any
    programs: int
    arguments: dict[str, Tensor | float | int | None]
    constants: dict[str, int | bool]
    config: Config

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "maxnreg": self.config.registers}

    def run(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def decode(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, lengths: Tensor, tiles: DecodeTiles, scale: float, window: int,
           out: Tensor) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of the same lengths and window; the layer's keys, and values, are contiguous."""
    _decode(q, kv, tables, rows, lengths, tiles, scale, window, out).run()


def prefill(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor, tiles: Tensor, scale: float,
            window: int, out: Tensor) -> None:  # fmt: skip
    """As in reference/. ``tiles`` of ``prefill_tiles`` with ``prefill_config(...).rows``; the layer's keys, and values, are contiguous."""
    _prefill(q, kv, tables, rows, query_start, lengths, tiles, scale, window, out).run()


def _decode(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, lengths: Tensor, tiles: DecodeTiles, scale: float, window: int,
            out: Tensor) -> Launch:  # fmt: skip
    _, kv_heads, block_size, head_dim = kv.keys.shape
    group = q.shape[1] // kv_heads
    config = decode_config(head_dim, block_size, q.dtype, kv.keys.dtype, group)
    scratch = tiles.scratch
    arguments: dict[str, Tensor | float | int | None] = {
        "queries": q, "keys": kv.keys, "values": kv.values, "key_scales": kv.key_scales, "value_scales": kv.value_scales,
        "tables": tables, "rows": rows, "lengths": lengths, "count": tiles.count, "first_slots": tiles.first_slots, "tiles": tiles.pairs,
        "partial": scratch.partial, "maxima": scratch.maxima, "sums": scratch.sums, "arrived": scratch.arrived, "out": out,
        "scale": scale * LOG2_E, "row_stride": q.stride(0), "head_stride": q.stride(1), "table_width": tables.stride(0),
    }  # fmt: skip
    constants: dict[str, int | bool] = {
        "KV_HEADS": kv_heads, "GROUP": group, "GROUP_PAD": padded(group), "HEAD_DIM": head_dim, "DIM_PAD": padded(head_dim),
        "BLOCK_SIZE": block_size, "WINDOW": window, "SPLIT": SPLIT, "TILE": config.tile, "UPCAST": INTERPRETED,
    }  # fmt: skip
    return Launch(decode_kernel, tiles.programs, arguments, constants, config)


def _prefill(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor, tiles: Tensor, scale: float,
             window: int, out: Tensor) -> Launch:  # fmt: skip
    _, kv_heads, block_size, head_dim = kv.keys.shape
    heads = q.shape[1]
    config = prefill_config(head_dim, block_size, q.dtype, kv.keys.dtype)
    arguments: dict[str, Tensor | float | int | None] = {
        "queries": q, "keys": kv.keys, "values": kv.values, "key_scales": kv.key_scales, "value_scales": kv.value_scales,
        "tables": tables, "rows": rows, "query_start": query_start, "lengths": lengths, "tiles": tiles, "out": out,
        "scale": scale * LOG2_E, "row_stride": q.stride(0), "head_stride": q.stride(1), "table_width": tables.stride(0),
    }  # fmt: skip
    constants: dict[str, int | bool] = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "DIM_PAD": padded(head_dim), "BLOCK_SIZE": block_size,
        "WINDOW": window, "ROWS": config.rows, "TILE": config.tile, "UPCAST": INTERPRETED,
    }  # fmt: skip
    return Launch(prefill_kernel, len(tiles) * heads, arguments, constants, config)
