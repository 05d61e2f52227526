"""Attention of one query for each sequence: a fixed grid of programs strides over the (split of a sequence, KV head) pairs of a step.

All query heads of a KV head are rows of one tile, so that keys and values are read once. Whoever finishes the last split of a sequence
merges the splits, in ascending order: no second launch, and nothing that depends on who that was. A step at batch 32 takes some 30 µs
on the fastest memory; another launch would be a sixth of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.layers import capped
from quire.backends.cuda.kernels.paged import block_ids, halves, load_scales, load_tile, prefetch_tile, product, sink_weight, value_power
from quire.backends.cuda.kernels.programmatic import start_next, wait


@Kernel
@triton.jit
def decode_kernel(
    queries, keys, values, key_scales, value_scales, sinks, tables, rows, lengths, count, first_slots, tiles, partial, maxima, sums,
    arrived, out, scale, row_stride, head_stride, table_width, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, UPCAST: tl.constexpr, PAIRS: tl.constexpr, FP16: tl.constexpr, SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``scale`` and SOFTCAP, which is 0 where scores have no limit, include log2(e). PAIRS: values of 8 bits are loaded two at a time.
    FP16: products are of float16, not of the queries' type. What belongs to the next item is loaded before the current one is computed.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    items = tl.load(count) * KV_HEADS
    g = tl.arange(0, GROUP_PAD)
    t = tl.arange(0, TILE)
    d = tl.arange(0, DIM_PAD)
    here = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]

    sequence, split = _tile(tiles, program, items, KV_HEADS)
    length, row, first_slot = _sequence(lengths, rows, first_slots, sequence)
    next_sequence, next_split = _tile(tiles, program + programs, items, KV_HEADS)
    if PDL:  # noqa: SIM102 - a constant, and not
        if program < items:  # what the first tile's last positions are is being written, which the cache takes into account
            start, end = _keys(split, _splits(length, SPLIT), length, SPLIT, WINDOW)
            first = start // TILE * TILE
            ids = block_ids(tables + row.to(tl.int64) * table_width, first, t, tl.maximum(end - 1, 0), BLOCK_SIZE, TILE)
            prefetch_tile(keys, ids, program % KV_HEADS * BLOCK_SIZE, first, t, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
            prefetch_tile(values, ids, program % KV_HEADS * BLOCK_SIZE, first, t, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
    start_next(PDL)
    wait(PDL)
    for item in range(program, items, programs):
        next_length, next_row, next_slot = _sequence(lengths, rows, first_slots, next_sequence)
        later_sequence, later_split = _tile(tiles, item + 2 * programs, items, KV_HEADS)

        head = item % KV_HEADS
        splits = _splits(length, SPLIT)
        start, end = _keys(split, splits, length, SPLIT, WINDOW)
        before = 0  # splits that left the window
        if WINDOW > 0:
            before = tl.minimum(tl.maximum(length - WINDOW, 0) // SPLIT, splits - 1)
        splits -= before
        at = sequence.to(tl.int64) * row_stride + (head * GROUP + g)[:, None] * head_stride + d[None, :]
        q = tl.load(queries + at, mask=here, other=0.0)
        row_scale = tl.full([GROUP_PAD], 1.0, tl.float32) * scale
        if FP16:  # e4m3 becomes float16 in half the instructions; a power of two keeps q in its range
            exponent = tl.max(tl.abs(q.to(tl.float32)), 1).to(tl.int32, bitcast=True) & 0x7F800000
            power = tl.where(exponent == 0, 1.0, exponent.to(tl.float32, bitcast=True))
            q = (q.to(tl.float32) / power[:, None]).to(tl.float16)
            row_scale *= power
        table = tables + row.to(tl.int64) * table_width
        inner = head * BLOCK_SIZE

        acc = tl.zeros([GROUP_PAD, DIM_PAD // 2 if PAIRS else DIM_PAD], tl.float32)
        acc_odd = acc
        sums_of_lanes = tl.zeros([GROUP_PAD, TILE], tl.float32)  # added up at the end: a sum over keys crosses warps
        largest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        first = start // TILE * TILE
        last = tl.maximum(end - 1, 0)
        ids = block_ids(table, first, t, last, BLOCK_SIZE, TILE)
        seen = (first + t >= start) & (first + t < end)
        key_scale = load_scales(key_scales, ids, inner, first, t, seen, KV_HEADS, BLOCK_SIZE, TILE)
        value_scale = load_scales(value_scales, ids, inner, first, t, seen, KV_HEADS, BLOCK_SIZE, TILE)
        for j in range(first, end, TILE):
            seen = (j + t >= start) & (j + t < end)
            there = seen[:, None] & (d < HEAD_DIM)[None, :]
            k = load_tile(keys, ids, inner, j, t, d, there, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
            if PAIRS:
                d2 = tl.arange(0, DIM_PAD // 2)
                there = seen[:, None] & (d2 < HEAD_DIM // 2)[None, :]
                pairs = values.to(tl.pointer_type(tl.int16))
                v, v_odd = halves(
                    load_tile(pairs, ids, inner, j, t, d2, there, KV_HEADS, HEAD_DIM // 2, BLOCK_SIZE, TILE), values.dtype.element_ty
                )
            else:
                v = load_tile(values, ids, inner, j, t, d, there, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
            scores = product(q, tl.trans(k), None, UPCAST)
            if key_scales is not None:
                scores *= key_scale.to(tl.float32)[None, :]
            if SOFTCAP > 0:
                scores = capped(scores * row_scale[:, None], SOFTCAP)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            factor = tl.full([GROUP_PAD], 1.0, tl.float32) if SOFTCAP > 0 else row_scale
            higher = tl.maximum(largest, tl.max(scores, 1) * factor)
            p = tl.exp2(tl.fma(scores, tl.broadcast_to(factor[:, None], scores.shape), -higher[:, None]))
            decay = tl.exp2(largest - higher)
            sums_of_lanes = tl.fma(sums_of_lanes, tl.broadcast_to(decay[:, None], p.shape), p)
            if value_scales is not None:
                p *= value_scale.to(tl.float32)[None, :] * value_power(values, q.dtype)
            weights = p.to(q.dtype)
            acc = product(weights, v, acc * decay[:, None], UPCAST)
            if PAIRS:
                acc_odd = product(weights, v_odd, acc_odd * decay[:, None], UPCAST)
            largest = higher
            ids = block_ids(table, j + TILE, t, last, BLOCK_SIZE, TILE)
            seen = j + TILE + t < end
            key_scale = load_scales(key_scales, ids, inner, j + TILE, t, seen, KV_HEADS, BLOCK_SIZE, TILE)
            value_scale = load_scales(value_scales, ids, inner, j + TILE, t, seen, KV_HEADS, BLOCK_SIZE, TILE)

        if value_scales is not None:
            acc *= 1.0 / value_power(values, q.dtype)
            acc_odd *= 1.0 / value_power(values, q.dtype)
        if PAIRS:
            acc = tl.reshape(tl.join(acc, acc_odd), (GROUP_PAD, DIM_PAD))
        total = tl.sum(sums_of_lanes, 1)
        if splits > 1:
            slot = first_slot + split - before
            heads = (slot * KV_HEADS + head).to(tl.int64) * GROUP + g
            tl.store(maxima + heads, largest, mask=g < GROUP)
            tl.store(sums + heads, total, mask=g < GROUP)
            tl.store(partial + heads[:, None] * HEAD_DIM + d[None, :], acc, mask=here)
            tl.debug_barrier()  # all threads have written, before one of them says so
            counter = arrived + sequence * KV_HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
                tl.store(counter, 0)  # for the next launch
                acc, total, largest = _merge(partial, maxima, sums, first_slot, splits, head, g, d, here, KV_HEADS, GROUP, HEAD_DIM)
                _store(out, sinks, sequence, head, acc, total, largest, g, d, here, KV_HEADS, GROUP, HEAD_DIM)
        else:
            _store(out, sinks, sequence, head, acc, total, largest, g, d, here, KV_HEADS, GROUP, HEAD_DIM)

        sequence, split, length, row, first_slot = next_sequence, next_split, next_length, next_row, next_slot
        next_sequence, next_split = later_sequence, later_split


@triton.jit
def _splits(length, SPLIT: tl.constexpr):
    """As in tiles.count_splits, without a window."""
    return tl.maximum((length + SPLIT // 2 - 1) // SPLIT, 1)


@triton.jit
def _keys(split, splits, length, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """The first key of a split that the query sees, and the end."""
    start = split * SPLIT
    if WINDOW > 0:
        start = tl.maximum(start, length - WINDOW)
    return start, tl.where(split + 1 == splits, length, split * SPLIT + SPLIT)


@triton.jit
def _tile(tiles, item, items, KV_HEADS: tl.constexpr):
    at = tiles + item // KV_HEADS * 2
    there = item < items
    return tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)


@triton.jit
def _sequence(lengths, rows, first_slots, sequence):
    return tl.load(lengths + sequence), tl.load(rows + sequence), tl.load(first_slots + sequence)


@triton.jit
def _merge(
    partial, maxima, sums, first_slot, splits, head, g, d, here, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Sums of the splits, each relative to the largest score so far. Read past the first-level cache: others wrote them."""
    acc = tl.zeros([g.shape[0], d.shape[0]], tl.float32)
    total = tl.zeros([g.shape[0]], tl.float32)
    largest = tl.full([g.shape[0]], float("-inf"), tl.float32)
    AT_ONCE: tl.constexpr = 4 if g.shape[0] * d.shape[0] <= 2048 else 1  # as many as registers hold
    for i in tl.range(0, splits, num_stages=1, loop_unroll_factor=AT_ONCE):
        heads = ((first_slot + i) * KV_HEADS + head).to(tl.int64) * GROUP + g
        maximum = tl.load(maxima + heads, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        part = tl.load(sums + heads, mask=g < GROUP, other=1.0, cache_modifier=".cg")
        numbers = tl.load(partial + heads[:, None] * HEAD_DIM + d[None, :], mask=here, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(largest, maximum)
        decay, factor = tl.exp2(largest - higher), tl.exp2(maximum - higher)
        acc = tl.fma(numbers, tl.broadcast_to(factor[:, None], acc.shape), acc * decay[:, None])
        total = tl.fma(part, factor, total * decay)
        largest = higher
    return acc, total, largest


@triton.jit
def _store(
    out, sinks, sequence, head, acc, total, largest, g, d, here, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """The only place where a row meets its heads' sinks."""
    if sinks is not None:
        total += sink_weight(tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=0.0), largest)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]  # 0: padding, of length 0
    at = (sequence.to(tl.int64) * KV_HEADS + head) * GROUP + g
    tl.store(out + at[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty), mask=here)
