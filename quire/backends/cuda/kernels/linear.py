"""Matrix products of a few rows, and those of all where a row's result must not depend on the others. Weights of 8 bits become x's type
in registers.

One row is multiplied without tensor cores, by programs that hold their part of the weights before the row is there: in a step of one
sequence of a small model, products wait more for each other than for memory.

For more rows, the weights are the left operand: a tensor core instruction takes that from registers, where it was converted, and 64 rows
at least, of which there are always enough, while few tokens fit the other side. A program sums over all of K, in order. Hopper's tensor
cores then give the same bits for every tile (measured: docs/benchmarks/cuda.md), and so for every number of tokens. Programs for few tokens
have deep pipelines: with 8 tiles on their way, 64 of them keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.attention_configs import LARGEST
from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.launching import Kernel, shared_memory
from quire.backends.cuda.kernels.layers import activate, gated
from quire.backends.cuda.kernels.programmatic import start_next, wait
from quire.backends.cuda.kernels.rounding import narrow
from quire.models.spec import Activation


@dataclass(slots=True, frozen=True)
class Tiles:
    tokens: int
    channels: int
    depth: int
    """Of K, at a time."""
    warps: int
    stages: int


TILES: dict[int, tuple[Tiles, ...]] = {
    2: (
        Tiles(256, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 5), Tiles(128, 64, 64, 4, 6), Tiles(64, 128, 64, 8, 6), Tiles(64, 64, 64, 4, 8),
        Tiles(32, 64, 128, 4, 6), Tiles(16, 64, 128, 4, 8),
    ),
    1: (Tiles(128, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 6), Tiles(32, 64, 128, 4, 6), Tiles(16, 64, 128, 4, 8)),
}  # fmt: skip
"""By the bytes of a weight, large ones first: see ``choose``. Measured on an H200."""
X_BYTES = 2
"""Of a number of x, but for float32."""
FLOAT32 = Tiles(16, 32, 32, 4, 2)
"""Of x: without tensor cores, for tests."""
PROGRAMS = 96
"""So many at least, of the largest tiles that give them."""
MANY = 264
"""Programs of more tiles of few tokens than this do better with two on a multiprocessor than with a deep pipeline each."""
GROUP = 8
"""Tiles of tokens that go through the channels together, so that their x stays in the L2 cache."""
FEW = 32
"""Rows up to which products are ours anyway; the library's are faster with more."""
ROW_ELEMENTS = 8192
"""Weights that a program of ``_row`` holds: 64 for each thread."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, same: bool = False, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As in reference/. Rows of x are contiguous; they may be apart. weight and out are contiguous."""
    few = _is_few(x, scales)
    if scales is None and not same and not few:
        return _of_library(x, weight, bias, out)
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if few and not same and x.shape[0] == 1:
        _one_row(x, weight, bias, out)
    else:
        _rows(x, weight, bias, scales, out, None)
    return out


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, same: bool, gate: Activation
) -> Tensor:  # fmt: skip
    """As in reference/. Rows of x are contiguous; they may be apart. weight is contiguous."""
    if not _is_few(x, scales) or x.shape[0] == 1:
        return activate(linear(x, weight, bias, scales, same), gate, True)
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    _rows(x, weight, bias, scales, out, gate)
    return out


@lru_cache(4096)
def choose(tokens: int, channels: int, weight_bytes: int, shared: int = LARGEST) -> Tiles:
    """The largest tile that gives programs enough, of those for no more tokens than there are; where none does, the smallest that holds
    them, or 64 of them. ``shared``: see ``fitted``."""
    tiles = TILES[weight_bytes]
    most = min((each.tokens for each in tiles if each.tokens >= tokens), default=tiles[0].tokens)
    fitting = [each for each in tiles if min(most, 64) <= each.tokens <= most]
    enough = (each for each in fitting if -(-tokens // each.tokens) * -(-channels // each.channels) >= PROGRAMS)
    return fitted(next(enough, fitting[-1]), weight_bytes, shared)


def fitted(tiles: Tiles, weight_bytes: int, shared: int) -> Tiles:
    """With as many stages as ``shared`` bytes of memory have room for: which do not change results."""
    stage = (tiles.tokens * X_BYTES + tiles.channels * weight_bytes) * tiles.depth
    return replace(tiles, stages=max(2, min(tiles.stages, shared // stage)))


def stages_of(tiles: Tiles, programs: int) -> int:
    """Of a launch of so many programs."""
    return min(4, tiles.stages) if programs > MANY and tiles.tokens <= FEW else tiles.stages


def _rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, out: Tensor, gate: Activation | None
) -> None:  # fmt: skip
    tokens, depth = x.shape
    channels = weight.shape[0]
    tiles = FLOAT32 if x.dtype == torch.float32 else choose(tokens, channels, weight.element_size(), shared_memory())
    programs = -(-tokens // tiles.tokens) * -(-channels // tiles.channels)
    constants = channels, depth, tiles.tokens, tiles.channels, tiles.depth, GROUP, gate, INTERPRETED
    arguments = x, weight, scales, bias, out, tokens, x.stride(0)
    _linear.launch((programs,), arguments, constants, warps=tiles.warps, stages=stages_of(tiles, programs))


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    channels, depth = weight.shape
    padded = 1 << (depth - 1).bit_length()
    each = max(1, ROW_ELEMENTS // padded)
    _row.launch((-(-channels // each),), (x, weight, bias, out), (channels, depth, padded, each))


def _of_library(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _is_few(x: Tensor, scales: Tensor | None) -> bool:
    """Whether products of these rows are ours, whatever is asked for."""
    return scales is None and x.shape[0] <= FEW and x.dtype != torch.float32 and x.shape[1] % 128 == 0


@Kernel
@triton.jit
def _row(x, weight, bias, out, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, PADDED: tl.constexpr, EACH: tl.constexpr, PDL: tl.constexpr):
    n = tl.program_id(0) * EACH + tl.arange(0, EACH)
    k = tl.arange(0, PADDED)
    start_next(PDL)
    # Beyond the end the last channel is read again: what comes of it is not stored.
    at = weight + tl.minimum(n, CHANNELS - 1).to(tl.int64)[:, None] * DEPTH + k[None, :]
    w = tl.load(at, mask=(k < DEPTH)[None, :], other=0.0)
    wait(PDL)
    row = tl.load(x + k, mask=k < DEPTH, other=0.0).to(tl.float32)
    sums = tl.sum(w.to(tl.float32) * row[None, :], 1)
    if bias is not None:
        sums += tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)
    tl.store(out + n, narrow(sums, out.dtype.element_ty), mask=n < CHANNELS)


@Kernel
@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x, weight, scales, bias, out, tokens, x_stride, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GATE: see ``channels_of``; WIDE: see ``multiply``."""
    tile_t, tile_n = tile_of(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.cdiv(CHANNELS, BLOCK_N), GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = channels_of(tile_n, CHANNELS, BLOCK_N, GATE)
    # Beyond the end the last ones are read again: what comes of them is not stored, and loads need no masks.
    w_at = weight + tl.minimum(n, CHANNELS - 1).to(tl.int64)[:, None] * DEPTH
    x_at = x + tl.minimum(t, tokens - 1).to(tl.int64)[None, :] * x_stride
    wait(PDL)
    sums = multiply(w_at, x_at, DEPTH, BLOCK_T, BLOCK_N, BLOCK_K, WIDE)
    start_next(PDL)
    if scales is not None:
        sums *= tl.load(scales + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=n < CHANNELS, other=0.0).to(tl.float32)[:, None]
    put(sums, out, t, t < tokens, tile_n, CHANNELS, BLOCK_T, BLOCK_N, GATE)


@triton.jit
def tile_of(program, tiles_t, tiles_n, GROUP: tl.constexpr):
    """(tile of tokens, tile of channels) of a program: GROUP tiles of tokens go through the channels together."""
    start = program // (GROUP * tiles_n) * GROUP
    wide = tl.minimum(tiles_t - start, GROUP)
    inside = program % (GROUP * tiles_n)
    return start + inside % wide, inside // wide


@triton.jit
def channels_of(tile, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr):
    """[BLOCK_N] channels of a tile. GATE: an activation of the first half of the channels, which the other half is multiplied by; a tile
    has as many of both."""
    r = tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N + r
    if GATE is not None:
        n = tile * (BLOCK_N // 2) + r % (BLOCK_N // 2) + r // (BLOCK_N // 2) * (CHANNELS // 2)
    return n


@triton.jit
def multiply(
    w_at, x_at, DEPTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Sums [BLOCK_N, BLOCK_T] over K, in its order, of the weights at w_at [BLOCK_N, 1] and the rows of x at x_at [1, BLOCK_T].
    WIDE: in the interpreter, which multiplies the bits of bfloat16 as whole numbers."""
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for depth in range(0, DEPTH, BLOCK_K):
        k = depth + tl.arange(0, BLOCK_K)
        if DEPTH % BLOCK_K == 0:
            w, rows = tl.load(w_at + k[None, :]), tl.load(x_at + k[:, None])
        else:
            w = tl.load(w_at + k[None, :], mask=(k < DEPTH)[None, :], other=0.0)
            rows = tl.load(x_at + k[:, None], mask=(k < DEPTH)[:, None], other=0.0)
        if WIDE:
            w, rows = w.to(tl.float32), rows.to(tl.float32)
        sums = tl.dot(w.to(rows.dtype), rows, sums, input_precision="ieee")
    return sums


@triton.jit
def put(
    sums, out, rows, there, tile, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr
):  # fmt: skip
    """Store sums [BLOCK_N, BLOCK_T] of a tile of channels, gated or not, as the ``rows`` [BLOCK_T] of out that are ``there``."""
    WIDTH: tl.constexpr = CHANNELS if GATE is None else CHANNELS // 2
    WIDE_N: tl.constexpr = BLOCK_N if GATE is None else BLOCK_N // 2
    n = tile * WIDE_N + tl.arange(0, WIDE_N)
    if GATE is not None:
        gate, up = tl.split(tl.permute(tl.reshape(sums, (2, BLOCK_N // 2, BLOCK_T)), (1, 2, 0)))
        # Rounded in between, as where the activation is a kernel of its own.
        gate, up = narrow(gate, out.dtype.element_ty).to(tl.float32), narrow(up, out.dtype.element_ty).to(tl.float32)
        sums = gated(gate, up, GATE)
    at = out + rows.to(tl.int64)[None, :] * WIDTH + n[:, None]
    tl.store(at, narrow(sums, out.dtype.element_ty), mask=(n < WIDTH)[:, None] & there[None, :])
