"""Attention of many queries of a sequence: a program for a tile of queries of one head, a loop over tiles of keys.

Tiles of keys lie at absolute positions, and a key that a query may not see adds exact zeros to it. So a query's result does not depend
on which queries share its tile, nor on how its prompt was cut. Products that are followed by a sum are written as ``fma``, so that the
loops with and without masks round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.layers import capped
from quire.backends.cuda.kernels.paged import block_ids, load_scales, load_tile, product, sink_weight, value_power


@Kernel
@triton.jit
def prefill_kernel(
    queries, keys, values, key_scales, value_scales, sinks, tables, rows, query_start, lengths, tiles, out, scale, row_stride,
    head_stride, table_width, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """``scale`` and SOFTCAP include log2(e). Grid: a program for each tile and head, heads first."""
    program = tl.program_id(0)
    head = program % HEADS
    sequence = tl.load(tiles + program // HEADS * 2)
    first_row = tl.load(tiles + program // HEADS * 2 + 1) * ROWS
    start = tl.load(query_start + sequence)
    length = tl.load(lengths + sequence)
    count = tl.load(query_start + sequence + 1) - start
    table = tables + tl.load(rows + sequence).to(tl.int64) * table_width

    first = length - count + first_row  # the position of the tile's first query
    end = tl.minimum(first + ROWS, length)  # of the keys that its last query sees
    r = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PAD)
    here = (r < count - first_row)[:, None] & (d < HEAD_DIM)[None, :]
    at = queries + (start + first_row).to(tl.int64) * row_stride + head * head_stride
    q = tl.load(at + r[:, None] * row_stride + d[None, :], mask=here, other=0.0)

    kv_head = head // (HEADS // KV_HEADS)

    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    full_end = (first + 1) // TILE * TILE  # before it, all keys of a tile are seen by all queries (but for the window)
    full_start = 0
    if WINDOW > 0:
        left = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
        full_start = tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE
        acc, total, largest = _visit(
            q, acc, total, largest, keys, values, key_scales, value_scales, kv_head, table, scale, left,
            tl.minimum(full_start, end), first, end, KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, WINDOW, ROWS, TILE, True, UPCAST, SOFTCAP,
        )  # fmt: skip
    acc, total, largest = _visit(
        q, acc, total, largest, keys, values, key_scales, value_scales, kv_head, table, scale, full_start, full_end,
        first, end, KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, WINDOW, ROWS, TILE, False, UPCAST, SOFTCAP,
    )  # fmt: skip
    acc, total, largest = _visit(
        q, acc, total, largest, keys, values, key_scales, value_scales, kv_head, table, scale,
        tl.maximum(full_start, full_end), end, first, end, KV_HEADS, HEAD_DIM, DIM_PAD, BLOCK_SIZE, WINDOW, ROWS, TILE, True, UPCAST,
        SOFTCAP,
    )  # fmt: skip
    if value_scales is not None:
        acc *= 1.0 / value_power(values, q.dtype)
    if sinks is not None:
        total += sink_weight(tl.load(sinks + head), largest)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]  # 0: no query is there
    at = out + ((start + first_row).to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(at + r[:, None] * (HEADS * HEAD_DIM) + d[None, :], result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _visit(
    q, acc, total, largest, keys, values, key_scales, value_scales, kv_head, table, scale, start, stop, first, end,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The tiles of keys from ``start`` to before ``stop``."""
    t = tl.arange(0, TILE)
    d = tl.arange(0, DIM_PAD)
    r = first + tl.arange(0, ROWS)
    ids = block_ids(table, start, t, end - 1, BLOCK_SIZE, TILE)
    inner = kv_head * BLOCK_SIZE
    for j in range(start, stop, TILE):
        position = j + t
        readable, there = None, None
        if HEAD_DIM < DIM_PAD:
            there = (d < HEAD_DIM)[None, :]
        if MASKED:
            readable = position < end
            if WINDOW > 0:
                readable = readable & (position > first - WINDOW)  # before it are blocks that left
            there = readable[:, None] & (d < HEAD_DIM)[None, :]
        k = load_tile(keys, ids, inner, j, t, d, there, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
        scores = product(q, tl.trans(k), None, UPCAST)
        if key_scales is not None:
            scores *= load_scales(key_scales, ids, inner, j, t, readable, KV_HEADS, BLOCK_SIZE, TILE).to(tl.float32)[None, :]
        factor = scale
        if SOFTCAP > 0:
            scores, factor = capped(scores * scale, SOFTCAP), 1.0
        if MASKED:
            seen = position[None, :] <= r[:, None]
            if WINDOW > 0:
                seen = seen & (position[None, :] > r[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * factor)
        reference = higher
        if MASKED:
            reference = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen no key yet
        p = tl.exp2(tl.fma(scores, factor, -reference[:, None]))
        decay = tl.exp2(largest - reference)  # exactly 1 where no key was higher: a tile that is not seen changes nothing
        total = tl.fma(total, decay, tl.sum(p, 1))
        if value_scales is not None:
            value_scale = load_scales(value_scales, ids, inner, j, t, readable, KV_HEADS, BLOCK_SIZE, TILE).to(tl.float32)
            p *= value_scale[None, :] * value_power(values, q.dtype)
        v = load_tile(values, ids, inner, j, t, d, there, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
        acc = product(p.to(q.dtype), v, acc * decay[:, None], UPCAST)
        largest = higher
        ids = block_ids(table, j + TILE, t, end - 1, BLOCK_SIZE, TILE)
    return acc, total, largest
