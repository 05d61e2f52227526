"""Matrix products of a few rows, and those of all where a row's result must not depend on the others. Weights of 8 bits become x's type
in registers.

One row is multiplied without tensor cores, by programs that hold their part of the weights before the row is there: in a step of one
sequence of a small model, products wait more for each other than for memory.

For more rows, the weights are the left operand: a tensor core instruction takes that from registers, where it was converted, and 64 rows
at least, of which there are always enough, while few tokens fit the other side. K is cut into splits, by the shape of the weights alone:
few channels would else keep few multiprocessors busy. With few tokens each split is a program of its own, and who ends last adds them
up; with many a program does all of them. Sums run in the same order for every number of tokens: over K within a split, then over splits.
(Tensor cores of Hopper give the same bits whatever the tile: measured, see docs/benchmarks/cuda.md.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.layers import activate, activation
from quire.backends.cuda.kernels.programmatic import programmatic, start_next, wait
from quire.backends.cuda.kernels.rounding import narrow
from quire.models.spec import Activation


@dataclass(slots=True, frozen=True)
class Tiles:
    tokens: int
    channels: int
    depth: int
    """Of K, at a time. The same for all of a type, so that sums are."""
    warps: int
    stages: int


@dataclass(slots=True, frozen=True)
class Plan:
    """How weights of a width are multiplied."""

    tiles: tuple[Tiles, ...]
    """For more and more tokens: the first whose tile holds them, else the last."""
    programs: int
    """That splits may make, of 64 channels each."""
    least: int
    """Of K in a split: shorter ones end before they are up to speed."""
    step: int
    """Splits are multiples of it."""


PLANS = {
    2: Plan((Tiles(16, 64, 128, 4, 4), Tiles(32, 64, 128, 4, 4), Tiles(64, 64, 64, 4, 6), Tiles(128, 128, 64, 8, 4)), 264, 256, 128),
    1: Plan((Tiles(16, 64, 64, 4, 8), Tiles(64, 64, 64, 4, 6), Tiles(128, 128, 64, 8, 4)), 384, 768, 128),
}
"""By the bytes of a weight. Twice the depth spills where many tokens are: the sums of a split are there beside those of all."""
FLOAT32 = Plan((Tiles(16, 32, 32, 4, 2),), 384, 768, 128)
"""Of x: without tensor cores, for tests."""
MAX_SPLIT_TOKENS = 64
"""With more, there are programs enough."""
GROUP = 8
"""Tiles of tokens that go through the channels together, so that their x stays in the L2 cache."""
FEW = 32
"""Rows up to which products are ours anyway; the library's are faster with more."""
ROW_ELEMENTS = 8192
"""Weights that a program of ``_row`` holds: 64 for each thread."""
_COUNTERS = 4096


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, same: bool = False, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As in reference/. Rows of x are contiguous; they may be apart. weight and out are contiguous."""
    few = _is_few(x, scales)
    if scales is None and not same and not few:
        return _of_library(x, weight, bias, out)
    if out is None:
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    if few and not same and len(x) == 1:
        _one_row(x, weight, bias, out, None)
    else:
        _rows(x, weight, bias, scales, out, None)
    return out


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, same: bool, gate: Activation
) -> Tensor:  # fmt: skip
    """As in reference/. Rows of x are contiguous; they may be apart. weight is contiguous."""
    if not _is_few(x, scales):
        return activate(linear(x, weight, bias, scales, same), gate, True)
    out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
    if len(x) == 1 and not same:
        _one_row(x, weight, bias, out, gate)
    else:
        _rows(x, weight, bias, scales, out, gate)
    return out


def split_of(channels: int, depth: int, plan: Plan) -> tuple[int, int]:
    """The length of a split, and how many there are."""
    most = max(1, plan.programs // -(-channels // 64))
    split = max(plan.least, plan.step * -(-depth // (plan.step * most)))
    return split, -(-depth // split)


def _of_library(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gate: Activation | None) -> None:
    channels, depth = out.shape[1], weight.shape[1]
    padded = 1 << (depth - 1).bit_length()
    each = max(1, ROW_ELEMENTS // (padded if gate is None else 2 * padded))
    _row[(-(-channels // each),)](
        x, weight, bias, out, channels, depth, padded, each, gate, programmatic(), num_warps=4, launch_pdl=programmatic()
    )


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, out: Tensor, gate: Activation | None
) -> None:  # fmt: skip
    tokens, depth = x.shape
    channels = len(weight)
    plan = FLOAT32 if x.dtype == torch.float32 else PLANS[weight.element_size()]
    tiles = next((each for each in plan.tiles if tokens <= each.tokens), plan.tiles[-1])
    split, splits = split_of(channels, depth, plan)
    apart = splits > 1 and tokens <= MAX_SPLIT_TOKENS
    parts = torch.empty((splits, tokens, channels), dtype=torch.float32, device=x.device) if apart else None
    grid = (-(-tokens // tiles.tokens) * -(-channels // tiles.channels), splits if apart else 1)
    _linear[grid](
        x, weight, scales, bias, parts, _counters(x.device) if apart else None, out, tokens, x.stride(0), channels, depth, split, splits,
        tiles.tokens, tiles.channels, tiles.depth, GROUP, gate, INTERPRETED, programmatic(), num_warps=tiles.warps,
        num_stages=tiles.stages, launch_pdl=programmatic(),
    )  # fmt: skip


def _is_few(x: Tensor, scales: Tensor | None) -> bool:
    """Whether products of these rows are ours, whatever is asked for."""
    return scales is None and len(x) <= FEW and x.dtype != torch.float32 and x.shape[1] % 128 == 0


@cache
def _counters(device: torch.device) -> Tensor:
    """Splits of each tile that are done: 0 between launches, since who adds them up clears it."""
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def _row(
    x, weight, bias, out, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr, EACH: tl.constexpr, GATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * EACH + tl.arange(0, EACH)
    k = tl.arange(0, PADDED)
    start_next(PDL)
    # Beyond the end the last channel is read again: what comes of it is not stored.
    at = weight + tl.minimum(n, CHANNELS - 1).to(tl.int64)[:, None] * DEPTH + k[None, :]
    inside = (k < DEPTH)[None, :]
    w = tl.load(at, mask=inside, other=0.0)
    if GATE is not None:
        up = tl.load(at + CHANNELS * DEPTH, mask=inside, other=0.0)
    wait(PDL)
    row = tl.load(x + k, mask=k < DEPTH, other=0.0).to(tl.float32)[None, :]
    sums = _biased(tl.sum(w.to(tl.float32) * row, 1), bias, n, CHANNELS)
    if GATE is not None:
        ups = _biased(tl.sum(up.to(tl.float32) * row, 1), bias, CHANNELS + n, 2 * CHANNELS)
        sums = _gated(sums, ups, out.dtype.element_ty, GATE)
    tl.store(out + n, narrow(sums, out.dtype.element_ty), mask=n < CHANNELS)


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x, weight, scales, bias, parts, counters, out, tokens, x_stride, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GATE: an activation of the first half of the channels, which the other half is multiplied by; a tile has as many of both."""
    program, split = tl.program_id(0), tl.program_id(1)
    tiles_t, tiles_n = tl.cdiv(tokens, BLOCK_T), tl.cdiv(CHANNELS, BLOCK_N)
    start = program // (GROUP * tiles_n) * GROUP
    wide = tl.minimum(tiles_t - start, GROUP)
    inside = program % (GROUP * tiles_n)
    t = (start + inside % wide) * BLOCK_T + tl.arange(0, BLOCK_T)
    n, inside_n = _channels(inside // wide, CHANNELS, BLOCK_N, GATE)
    # Beyond the end the last ones are read again: what comes of them is not stored, and loads need no masks.
    w_at = weight + tl.minimum(n, CHANNELS - 1).to(tl.int64)[:, None] * DEPTH
    x_at = x + tl.minimum(t, tokens - 1).to(tl.int64)[None, :] * x_stride
    there = inside_n[:, None] & (t < tokens)[None, :]
    at = t.to(tl.int64)[None, :] * CHANNELS + n[:, None]
    wait(PDL)
    if parts is None:
        if SPLITS == 1:
            sums = _products(w_at, x_at, 0, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        else:
            sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for each in range(SPLITS):
                sums += _products(w_at, x_at, each, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        start_next(PDL)
        _finish(sums, scales, bias, out, inside // wide, n, t, tokens, CHANNELS, BLOCK_N, GATE)
    else:
        sums = _products(w_at, x_at, split, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        start_next(PDL)
        size = tokens.to(tl.int64) * CHANNELS
        tl.store(parts + split * size + at, sums, mask=there)
        tl.debug_barrier()  # all threads have written, before one of them says so
        if tl.atomic_add(counters + program, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + program, 0)  # for the next launch
            # Read past the first-level cache: others wrote them.
            sums = tl.load(parts + at, mask=there, other=0.0, cache_modifier=".cg")
            for each in tl.static_range(1, SPLITS):
                sums += tl.load(parts + each * size + at, mask=there, other=0.0, cache_modifier=".cg")
            _finish(sums, scales, bias, out, inside // wide, n, t, tokens, CHANNELS, BLOCK_N, GATE)


@triton.jit
def _channels(tile, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr):
    """Those of a tile, and which of them there are."""
    r = tl.arange(0, BLOCK_N)
    if GATE is None:
        n = tile * BLOCK_N + r
        there = n < CHANNELS
    else:
        first = tile * (BLOCK_N // 2) + r % (BLOCK_N // 2)
        n = tl.where(r < BLOCK_N // 2, first, first + CHANNELS // 2)
        there = first < CHANNELS // 2
    return n, there


@triton.jit
def _products(
    w_at, x_at, split, DEPTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Of channels at w_at [N, 1] and tokens at x_at [1, T], over one split of K: [N, T] float32."""
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for depth in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, DEPTH), BLOCK_K):
        k = depth + tl.arange(0, BLOCK_K)
        if DEPTH % BLOCK_K == 0:
            w, x = tl.load(w_at + k[None, :]), tl.load(x_at + k[:, None])
        else:
            w = tl.load(w_at + k[None, :], mask=(k < DEPTH)[None, :], other=0.0)
            x = tl.load(x_at + k[:, None], mask=(k < DEPTH)[:, None], other=0.0)
        sums = _product(w, x, sums, WIDE)
    return sums


@triton.jit
def _product(w, x, sums, WIDE: tl.constexpr):
    """sums + w · x. WIDE: in the interpreter, which multiplies the bits of bfloat16 as whole numbers."""
    if WIDE:
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")


@triton.jit
def _biased(sums, bias, n, CHANNELS: tl.constexpr):
    if bias is not None:
        sums += tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _gated(gate, up, dtype: tl.constexpr, KIND: tl.constexpr):
    """Rounded to ``dtype`` in between, as where a kernel of its own does it."""
    return activation(narrow(gate, dtype).to(tl.float32), KIND) * narrow(up, dtype).to(tl.float32)


@triton.jit
def _finish(sums, scales, bias, out, tile, n, t, tokens, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr):
    if scales is not None:
        sums *= tl.load(scales + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[:, None]
    sums = _biased(sums, bias, n[:, None], CHANNELS)
    WIDTH: tl.constexpr = CHANNELS if GATE is None else CHANNELS // 2
    if GATE is not None:
        n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, BLOCK_N // 2, t.shape[0])), (1, 2, 0)))
        sums = _gated(gate, up, out.dtype.element_ty, GATE)
    at = out + t.to(tl.int64)[None, :] * WIDTH + n[:, None]
    tl.store(at, narrow(sums, out.dtype.element_ty), mask=(n < WIDTH)[:, None] & (t < tokens)[None, :])
