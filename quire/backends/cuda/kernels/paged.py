"""What the attention kernels share: a tile of keys, or values, of one head out of the blocks, and the product of two tiles.

The block ids of a tile are loaded while the tile before it is computed, and carried through the loop. Loaded where they are used they
would take pipeline stages of their own, and leave K and V without a second buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_ids(table, start, t, last, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The blocks of the positions from ``start`` to ``last``: one id, or one for each position where a tile has several."""
    if BLOCK_SIZE >= TILE:
        ids = tl.load(table + tl.minimum(start, last) // BLOCK_SIZE)
    else:
        ids = tl.load(table + tl.minimum(start + t, last) // BLOCK_SIZE)
    return tl.maximum(ids, 0).to(tl.int64)


@triton.jit
def _tile_at(
    numbers, ids, inner, start, t, d, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """Where the elements ``d`` of a tile's positions are. Offsets within a tile are of 32 bits where it is one stretch."""
    if BLOCK_SIZE >= TILE:
        head = numbers + (ids * (KV_HEADS * BLOCK_SIZE) + inner) * HEAD_DIM
        at = head + ((start % BLOCK_SIZE + t)[:, None] * HEAD_DIM + d[None, :])
    else:
        place = ids * (KV_HEADS * BLOCK_SIZE) + (inner + (start + t) % BLOCK_SIZE)
        at = numbers + place[:, None] * HEAD_DIM + d[None, :]
    return at


@triton.jit
def load_tile(
    numbers, ids, inner, start, t, d, there, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Keys or values of the positions from ``start`` on, [TILE, DIM_PAD]; those that are not ``there`` are 0.

    ``inner``: the head's first position in a block.
    """
    at = _tile_at(numbers, ids, inner, start, t, d, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
    return tl.load(at) if there is None else tl.load(at, mask=there, other=0.0)


@triton.jit
def halves(pairs, element: tl.constexpr):
    """(elements 0, 2, 4, ..., elements 1, 3, 5, ...) of type ``element``, of 8 bits, of tiles whose pairs were loaded as numbers of 16.

    Values are the operand of a product that lies across its memory. Elements of 16 bits are turned round on the way out of shared
    memory; those of 8 would be read one by one.
    """
    low, high = pairs.to(tl.int8), (pairs >> 8).to(tl.int8)
    if element != tl.int8:
        low, high = low.to(element, bitcast=True), high.to(element, bitcast=True)
    return low, high


@triton.jit
def prefetch_tile(
    numbers, ids, inner, start, t, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Ask for the tile that ``load_tile`` will read, a line of 128 bytes at a time, to be brought into the L2 cache."""
    LINE: tl.constexpr = 1024 // numbers.dtype.element_ty.primitive_bitwidth
    d = tl.arange(0, triton.next_power_of_2(triton.cdiv(HEAD_DIM, LINE))) * LINE
    at = _tile_at(numbers, ids, inner, start, t, tl.minimum(d, HEAD_DIM - 1), KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_scales(scales, ids, inner, start, t, there, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Of the positions of a tile, [TILE] float16; those that are not ``there`` are 0. A number that nobody uses where there are none."""
    if scales is None:
        found = 0
    else:
        inside = start % BLOCK_SIZE + t if BLOCK_SIZE >= TILE else (start + t) % BLOCK_SIZE
        at = scales + ids * (KV_HEADS * BLOCK_SIZE) + (inner + inside)
        found = tl.load(at) if there is None else tl.load(at, mask=there, other=0.0)
    return found


@triton.jit
def value_power(values, weights: tl.constexpr):
    """A power of 2 for the scales of values of 8 bits whose products are of float16, which has nothing between 6e-5 and 0 in full: the
    scales are a 127th, or a 448th, of the largest number of a vector. It leaves room for all that float16 holds, as a value."""
    POWER: tl.constexpr = 1.0 if weights != tl.float16 else 64.0 if values.dtype.element_ty == tl.int8 else 256.0
    return POWER


@triton.jit
def sink_weight(sink, largest):
    """The weight of a sink, a score in natural logarithms, beside scores of which the largest one, in powers of 2, has the weight 1.
    Infinite where that is far below the sink: what is divided by it becomes 0."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.exp2(sink * LOG2_E - largest)


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr):
    """a · b (+ acc) in float32; b, keys or values as they are stored, is converted to a's type.

    UPCAST: in the interpreter, which multiplies the bits of bfloat16 as whole numbers, and whose products of float32 are BLAS calls that
    round a row according to its place in the tile.
    """
    if UPCAST:
        b = b.to(tl.float32).to(a.dtype)
        result = tl.dot(a.to(tl.float64), b.to(tl.float64))
        if acc is not None:
            result += acc
        result = result.to(tl.float32)
    else:
        result = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    return result
