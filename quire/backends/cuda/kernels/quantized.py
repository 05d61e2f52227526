"""Matrix products with weights of 8 bits, which become x's type in registers.

The weights are the left operand: a tensor core instruction takes that from registers, where it was converted, and 64 rows at least,
of which there are always enough, while few tokens fit the other side.

K is cut into splits, by the shape of the weights alone: few channels would else keep few multiprocessors busy. With few tokens each
split is a program of its own, and a second launch adds them up; with many a program does all of them. Sums run in the same order
for every number of tokens: over K within a split, then over splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.rounding import narrow


@dataclass(slots=True, frozen=True)
class Tiles:
    tokens: int
    channels: int
    depth: int
    """Of K, at a time. The same for all of a type, so that sums are."""
    warps: int
    stages: int


FEW = Tiles(16, 64, 64, 4, 8)
SOME = Tiles(64, 64, 64, 4, 6)
MANY = Tiles(128, 128, 64, 8, 4)
"""Twice the depth spills: the sums of a split are there beside those of all."""
FLOAT32 = Tiles(16, 32, 32, 4, 2)
"""Without tensor cores: for tests."""
MAX_SPLIT_TOKENS = 64
"""With more, there are programs enough."""
PROGRAMS = 384
"""That splits may make, of 64 channels each: about three for each multiprocessor, since one alone waits for itself."""
MIN_SPLIT = 768
"""Of K: shorter ones end before they are up to speed."""
GROUP = 8
"""Tiles of tokens that go through the channels together, so that their x stays in the L2 cache."""


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """As in reference/. Rows of x are contiguous; they may be apart. weight is contiguous."""
    tokens, depth = x.shape
    channels = weight.shape[0]
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    tiles = FLOAT32 if x.dtype == torch.float32 else FEW if tokens <= 16 else SOME if tokens <= 64 else MANY
    split, splits = _splits(channels, depth)
    apart = splits > 1 and tokens <= MAX_SPLIT_TOKENS
    parts = torch.empty((splits, tokens, channels), dtype=torch.float32, device=x.device) if apart else None
    grid = (-(-tokens // tiles.tokens) * -(-channels // tiles.channels), splits if apart else 1)
    _linear[grid](
        x, weight, scales, bias, parts, out, tokens, x.stride(0), channels, depth, split, splits, tiles.tokens, tiles.channels, tiles.depth,
        GROUP, INTERPRETED, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if apart:
        block = min(512, 1 << (channels - 1).bit_length())
        _add_splits[(tokens, -(-channels // block))](parts, scales, bias, out, tokens, channels, splits, block, num_warps=4)
    return out


def _splits(channels: int, depth: int) -> tuple[int, int]:
    """The length of a split, a multiple of what a program takes at a time, and how many there are."""
    most = max(1, PROGRAMS // -(-channels // 64))
    split = max(MIN_SPLIT, 128 * -(-depth // (128 * most)))
    return split, -(-depth // split)


@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x, weight, scales, bias, parts, out, tokens, x_stride, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0), tl.program_id(1)
    tiles_t, tiles_n = tl.cdiv(tokens, BLOCK_T), tl.cdiv(CHANNELS, BLOCK_N)
    start = program // (GROUP * tiles_n) * GROUP
    wide = tl.minimum(tiles_t - start, GROUP)
    inside = program % (GROUP * tiles_n)
    t = (start + inside % wide) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = inside // wide * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the end the last ones are read again: what comes of them is not stored, and loads need no masks.
    w_at = weight + tl.minimum(n, CHANNELS - 1).to(tl.int64)[:, None] * DEPTH
    x_at = x + tl.minimum(t, tokens - 1).to(tl.int64)[None, :] * x_stride
    there = (n < CHANNELS)[:, None] & (t < tokens)[None, :]
    at = t.to(tl.int64)[None, :] * CHANNELS + n[:, None]
    if parts is not None:
        sums = _products(w_at, x_at, split, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        tl.store(parts + split.to(tl.int64) * tokens * CHANNELS + at, sums, mask=there)
    else:
        if SPLITS == 1:
            sums = _products(w_at, x_at, 0, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        else:
            sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for each in range(SPLITS):
                sums += _products(w_at, x_at, each, DEPTH, SPLIT, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
        sums *= tl.load(scales + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            sums += tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, narrow(sums, out.dtype.element_ty), mask=there)


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
        if WIDE:
            w, x = w.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _add_splits(parts, scales, bias, out, tokens, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < CHANNELS
    sums = tl.load(parts + token * CHANNELS + n, mask=there, other=0.0)
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(parts + (split * tokens + token) * CHANNELS + n, mask=there, other=0.0)
    sums *= tl.load(scales + n, mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        sums += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * CHANNELS + n, narrow(sums, out.dtype.element_ty), mask=there)
