"""Mixtures of experts. Rows are sorted by expert on the device, so that those that take one meet its weights together.

The host reads nothing of it, and its launches hang on how many rows there are alone: there are as many programs as the distribution of rows
that makes most tiles needs, and those without a tile return. Each product is one launch for all experts, with the tiles of linear.py. A
program sums over all of K, in order, and a row's experts are added up in the order in which it chose them: so, by the argument there, its
result does not depend on the other rows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.launching import Kernel, shared_memory
from quire.backends.cuda.kernels.layers import MAX_COLUMNS, activate
from quire.backends.cuda.kernels.linear import (
    FLOAT32,
    GROUP,
    PROGRAMS,
    TILES,
    Tiles,
    channels_of,
    fitted,
    multiply,
    put,
    stages_of,
    tile_of,
)
from quire.backends.cuda.kernels.programmatic import start_next, wait
from quire.backends.cuda.kernels.rounding import narrow
from quire.models.spec import Activation

LARGE = 128
"""Rows of tiles that have twice as many as an expert has on average, so that most experts are one tile. Larger ones have no more than the
average: where computing takes the time, what an expert's last tile leaves empty counts."""
LEAST = tl.constexpr(1e-20)
"""Added to a sum of shares, which may all be 0."""
SORTED = 2048
"""(row, choice) pairs that a program of ``_sort`` looks at together."""


def route(
    scores: Tensor, taken: int, sum_to_one: bool, sigmoid: bool = False, correction: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in reference/."""
    rows, experts = scores.shape
    chosen = torch.empty((rows, taken), dtype=torch.int32, device=scores.device)
    weights = torch.empty((rows, taken), dtype=torch.float32, device=scores.device)
    padded = _padded(experts)
    constants = experts, padded, taken, _padded(taken), sum_to_one, sigmoid, scale
    _route.launch((rows,), (scores, correction, chosen, weights), constants, warps=max(1, min(padded // 128, 8)))
    return chosen, weights


def experts(
    x: Tensor, up: Tensor, up_bias: Tensor | None, up_scales: Tensor | None, down: Tensor, down_bias: Tensor | None,
    down_scales: Tensor | None, chosen: Tensor, weights: Tensor, activation: Activation, same: bool,
) -> Tensor:  # fmt: skip
    """As in reference/. Rows of x are contiguous; they may be apart. All of the experts' tensors are contiguous. same: so it is in any
    case."""
    rows, taken = chosen.shape
    count, channels, width = up.shape
    pairs = rows * taken
    mean = -(-pairs // count)
    gate = activation if channels == 2 * down.shape[2] else None
    tile_rows = FLOAT32.tokens if x.dtype == torch.float32 else rows_of_tile(mean, up.element_size())
    met = min(count, pairs)
    slots = met + (pairs - met) // tile_rows
    order = tiles = None
    if rows > 1:
        order = torch.empty(pairs, dtype=torch.int32, device=x.device)
        tiles = torch.empty((3, slots), dtype=torch.int32, device=x.device)
        _sort.launch((count,), (chosen, order, tiles, pairs, slots), (count, _padded(count), tile_rows, SORTED), warps=8)
    inner = torch.empty((pairs, down.shape[2]), dtype=x.dtype, device=x.device)
    _multiply(x, up, up_bias, up_scales, chosen, order, tiles, inner, slots, tile_rows, taken, gate)
    if gate is None:
        inner = activate(inner, activation, False)
    parts = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    _multiply(inner, down, down_bias, down_scales, chosen, order, tiles, parts, slots, tile_rows, 1, None)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = min(MAX_COLUMNS, _padded(width))
    _combine.launch((rows, -(-width // block)), (parts, weights, out), (width, taken, block))
    return out


def rows_of_tile(mean: int, weight_bytes: int) -> int:
    """mean: rows of an expert, on average. Up to LARGE // 2 of them memory is what takes time: most experts' weights are read once."""
    sizes = {each.tokens for each in TILES[weight_bytes]}
    larger = [size for size in sizes if LARGE < size <= mean]
    return max(larger) if larger else min(size for size in sizes if size >= min(2 * mean, LARGE))


@lru_cache(4096)
def choose(tile_rows: int, slots: int, channels: int, weight_bytes: int, shared: int) -> Tiles:
    """The tile of so many rows with the most channels that gives programs enough, or with the fewest. slots: tiles of rows; shared: see
    ``fitted``."""
    fitting = [each for each in TILES[weight_bytes] if each.tokens == tile_rows]
    enough = (each for each in fitting if slots * -(-channels // each.channels) >= PROGRAMS)
    return fitted(next(enough, fitting[-1]), weight_bytes, shared)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, chosen: Tensor, order: Tensor | None, tiles: Tensor | None,
    out: Tensor, slots: int, tile_rows: int, taken: int, gate: Activation | None,
) -> None:  # fmt: skip
    """Row i of out: of row i // taken of x and the expert of choice i."""
    _, channels, depth = weight.shape
    of = FLOAT32 if x.dtype == torch.float32 else choose(tile_rows, slots, channels, weight.element_size(), shared_memory())
    programs = slots * -(-channels // of.channels)
    constants = channels, depth, taken, of.tokens, of.channels, of.depth, GROUP, gate, INTERPRETED
    arguments = x, weight, scales, bias, chosen, order, tiles, out, slots, x.stride(0)
    _experts.launch((programs,), arguments, constants, warps=of.warps, stages=stages_of(of, programs))


def _padded(number: int) -> int:
    return 1 << (number - 1).bit_length()


@Kernel
@triton.jit
def _route(
    scores, correction, chosen, weights, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TAKEN: tl.constexpr, PADDED_TAKEN: tl.constexpr,
    SUM_TO_ONE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, PADDED)
    inside = e < EXPERTS
    found = tl.load(scores + row * EXPERTS + e, mask=inside, other=0.0).to(tl.float32)
    BY_SHARES: tl.constexpr = SIGMOID or correction is not None
    shares = found
    if BY_SHARES:
        if SIGMOID:
            shares = 1.0 / (1.0 + tl.exp(-found))
        else:
            shares = tl.where(inside, tl.exp(found - tl.max(tl.where(inside, found, -float("inf")), 0)), 0.0)
            shares = shares / tl.sum(shares, 0)
        found = shares
        if correction is not None:
            found += tl.load(correction + e, mask=inside, other=0.0)
    damaged = tl.max((found != found).to(tl.int32), 0) > 0
    found = tl.where(damaged | (found == 0.0), 0.0, found)  # -0.0 too, which has other bits
    # Of 64 bits that are in the order of scores and, where those are equal, of numbers, the other way round.
    keys = (_in_order(found.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (PADDED - 1 - e)
    NOTHING: tl.constexpr = -(1 << 63)
    keys = tl.where(inside, keys, NOTHING)
    i = tl.arange(0, PADDED_TAKEN)
    numbers, picked = tl.zeros([PADDED_TAKEN], tl.int32), tl.zeros([PADDED_TAKEN], tl.float32)
    for choice in range(TAKEN):
        best = tl.max(keys, 0)
        if BY_SHARES:
            score = tl.sum(tl.where(keys == best, shares, 0.0), 0)
        else:
            score = _in_order((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        keys = tl.where(keys == best, NOTHING, keys)
        numbers = tl.where(i == choice, PADDED - 1 - (best & 0xFFFFFFFF).to(tl.int32), numbers)
        picked = tl.where(i == choice, score, picked)
    taken = i < TAKEN
    if BY_SHARES:
        own = tl.where(taken, picked, 0.0)
        total = tl.sum(own, 0) + LEAST if SUM_TO_ONE else 1.0
    else:
        most = tl.max(tl.where(inside, found, -float("inf")), 0)
        own = tl.where(taken, tl.exp(picked - most), 0.0)
        total = tl.sum(own if SUM_TO_ONE else tl.where(inside, tl.exp(found - most), 0.0), 0)
    tl.store(chosen + row * TAKEN + i, numbers, mask=taken)
    tl.store(weights + row * TAKEN + i, tl.where(damaged, float("nan"), own / total * SCALE), mask=taken)


@triton.jit
def _in_order(bits):
    """The bits of floats as whole numbers in the order of the floats; of these, the bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@Kernel
@triton.jit(do_not_specialize=["pairs", "slots"])
def _sort(
    chosen, order, tiles, pairs, slots, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """order [pairs]: (row, choice) pairs by expert, those of one in their order. tiles [3, slots]: expert, the first pair in order, and
    the end of those of that expert or of the tile; those behind the last one are empty. A program has an expert, and counts them all."""
    start_next(PDL)
    wait(PDL)
    expert = tl.program_id(0)
    counts = tl.zeros([PADDED], tl.int32)
    for first in range(0, pairs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        counts += tl.histogram(tl.load(chosen + i, mask=i < pairs, other=0), PADDED, mask=i < pairs)
    e = tl.arange(0, PADDED)
    start = tl.sum(tl.where(e < expert, counts, 0), 0)
    end = start + tl.sum(tl.where(e == expert, counts, 0), 0)
    slot = tl.sum(tl.where(e < expert, tl.cdiv(counts, ROWS), 0), 0)
    at = start
    for first in range(0, pairs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        own = tl.load(chosen + i, mask=i < pairs, other=-1) == expert
        tl.store(order + at + tl.cumsum(own.to(tl.int32), 0) - 1, i, mask=own)
        at += tl.sum(own.to(tl.int32), 0)
    last = slots if expert == EXPERTS - 1 else slot + tl.cdiv(end - start, ROWS)
    for one in range(slot, last, PADDED):
        s = one + tl.arange(0, PADDED)
        here = start + (s - slot) * ROWS
        tl.store(tiles + s, tl.zeros_like(s) + expert, mask=s < last)
        tl.store(tiles + slots + s, here, mask=s < last)
        tl.store(tiles + 2 * slots + s, tl.minimum(here + ROWS, end), mask=s < last)


@Kernel
@triton.jit(do_not_specialize=["slots"])
def _experts(
    x, weight, scales, bias, chosen, order, tiles, out, slots, x_stride, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    TAKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``_linear``; without ``order`` and ``tiles`` there is one row, and every choice is a tile."""
    slot, tile_n = tile_of(tl.program_id(0), slots, tl.cdiv(CHANNELS, BLOCK_N), GROUP)
    n = channels_of(tile_n, CHANNELS, BLOCK_N, GATE)
    wait(PDL)
    if tiles is None:
        expert, first, end = tl.load(chosen + slot), slot, slot + 1
    else:
        expert, first, end = tl.load(tiles + slot), tl.load(tiles + slots + slot), tl.load(tiles + 2 * slots + slot)
        if first >= end:
            return
    t = first + tl.arange(0, BLOCK_T)
    # Beyond the end the last ones are read again: what comes of them is not stored, and loads need no masks.
    pair = tl.minimum(t, end - 1)
    if order is not None:
        pair = tl.load(order + pair)
    channel = expert.to(tl.int64) * CHANNELS + tl.minimum(n, CHANNELS - 1)
    w_at = weight + channel[:, None] * DEPTH
    x_at = x + (pair // TAKEN).to(tl.int64)[None, :] * x_stride
    sums = multiply(w_at, x_at, DEPTH, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
    start_next(PDL)
    if scales is not None:
        sums *= tl.load(scales + channel).to(tl.float32)[:, None]
    if bias is not None:
        sums += tl.load(bias + channel).to(tl.float32)[:, None]
    put(sums, out, pair, t < end, tile_n, CHANNELS, BLOCK_T, BLOCK_N, GATE)


@Kernel
@triton.jit
def _combine(parts, weights, out, WIDTH: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TAKEN):
        part = tl.load(parts + (row * TAKEN + i) * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        sums += tl.load(weights + row * TAKEN + i) * part
    tl.store(out + row * WIDTH + columns, narrow(sums, out.dtype.element_ty), mask=inside)
