"""Head norms, rotary and the write into the KV pool, in one launch: a program for each KV head of a token, with its queries."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.cache import LARGEST, LayerKV
from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.programmatic import start_next, wait
from quire.backends.cuda.kernels.rounding import narrow
from quire.backends.cuda.turns import Turns


def write_kv(
    qkv: Tensor,
    kv: LayerKV,
    positions: Tensor,
    slots: Tensor,
    num_heads: int,
    rope: Turns | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """As in reference/. Rows of qkv are contiguous; they may be apart. The layer's keys, and values, are contiguous."""
    _, kv_heads, block_size, head_dim = kv.keys.shape
    cos, sin, query_scales = (None, None, None) if rope is None else (rope.cos, rope.sin, rope.query_scales)
    half = 0 if cos is None else cos.shape[1]
    group = num_heads // kv_heads
    # 128 bits of queries a thread, about. More warps would mostly wait for each other, in sums over a head.
    warps = 1 << max(0, min(3, (group * head_dim // 384).bit_length() - 1))
    arguments = (
        qkv, kv.keys, kv.values, kv.key_scales, kv.value_scales, positions, slots, cos, sin, query_scales, q_norm, k_norm, qkv.stride(0),
        eps,
    )  # fmt: skip
    constants = kv_heads, group, head_dim, half, block_size, LARGEST.get(kv.keys.dtype, 0.0)
    _write.launch((qkv.shape[0], kv_heads), arguments, constants, warps=warps)


@Kernel
@triton.jit
def _write(
    qkv, keys, values, key_scales, value_scales, positions, slots, cos, sin, query_scales, q_norm, k_norm, qkv_stride, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    row = qkv + token.to(tl.int64) * qkv_stride
    slot = tl.load(slots + token)
    c, s = _angles(cos, sin, positions, token, HALF)
    start_next(PDL)
    wait(PDL)
    key_at = row + (KV_HEADS * GROUP + head + tl.arange(0, 1)[:, None]) * HEAD_DIM
    dims = _columns(HEAD_DIM)
    value = tl.load(key_at + KV_HEADS * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    first, second, rest = _head(key_at, True, k_norm, c, s, eps, HEAD_DIM, HALF)
    if cos is not None or q_norm is not None:  # stored when all is loaded: no load goes past a store
        g = tl.arange(0, triton.next_power_of_2(GROUP))[:, None]
        at = row + (head * GROUP + g) * HEAD_DIM
        if query_scales is not None:
            scale_of_query = tl.load(query_scales + tl.load(positions + token))
            c, s = c * scale_of_query, s * scale_of_query
        q_first, q_second, q_rest = _head(at, g < GROUP, q_norm, c, s, eps, HEAD_DIM, HALF)
        _store(at, g < GROUP, q_first, q_second, q_rest, HEAD_DIM, HALF)

    written = slot >= 0
    place = ((slot // BLOCK_SIZE).to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if key_scales is not None:
        largest = tl.max(_magnitudes(rest), 1)
        if HALF > 0:
            halves = tl.maximum(_magnitudes(first), _magnitudes(second))
            largest = tl.maximum(largest, tl.max(halves, 1))
        scale = _scale(largest, LARGEST)
        tl.store(key_scales + place + tl.arange(0, 1), scale, mask=written)
        inverse = 1.0 / scale.to(tl.float32)[:, None]
        first, second, rest = first * inverse, second * inverse, rest * inverse
        scale = _scale(tl.max(_magnitudes(value), 1), LARGEST)
        tl.store(value_scales + place + tl.arange(0, 1), scale, mask=written)
        value *= 1.0 / scale.to(tl.float32)[:, None]
    at = keys + place * HEAD_DIM + tl.arange(0, 1)[:, None]
    _store(at, written, first, second, rest, HEAD_DIM, HALF)
    tl.store(values + place * HEAD_DIM + dims, narrow(value, values.dtype.element_ty), mask=(dims < HEAD_DIM) & written)


@triton.jit
def _columns(COUNT: tl.constexpr):
    """0, 1, ... [1, N], at least ``COUNT`` and a power of two."""
    return tl.arange(0, triton.next_power_of_2(COUNT if COUNT > 0 else 1))[None, :]


@triton.jit
def _angles(cos, sin, positions, token, HALF: tl.constexpr):
    """Cosines and sines [1, half] of the token's position."""
    if cos is None:
        c, s = 1.0, 0.0
    else:
        half = _columns(HALF)
        at = tl.load(positions + token).to(tl.int64) * HALF + half
        c = tl.load(cos + at, mask=half < HALF, other=0.0)
        s = tl.load(sin + at, mask=half < HALF, other=0.0)
    return c, s


@triton.jit
def _head(at, there, norm, c, s, eps, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Heads [N, head_dim] at ``at`` [N, 1], normed and rotated, in float32: the two halves [N, half] of what is rotated, and the
    rest [N, rest]. Where there is none of a kind it is another one, and not to be used."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    half, others = _columns(HALF), _columns(REST)
    squares = 0.0
    if REST > 0:
        rest = tl.load(at + 2 * HALF + others, mask=there & (others < REST), other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1)[:, None]
    if HALF > 0:
        first = tl.load(at + half, mask=there & (half < HALF), other=0.0).to(tl.float32)
        second = tl.load(at + HALF + half, mask=there & (half < HALF), other=0.0).to(tl.float32)
        squares += tl.sum(first * first + second * second, 1)[:, None]
    if norm is not None:
        factor = tl.rsqrt(squares / HEAD_DIM + eps)
        if REST > 0:
            rest *= factor * tl.load(norm + 2 * HALF + others, mask=others < REST, other=0.0).to(tl.float32)
        if HALF > 0:
            first *= factor * tl.load(norm + half, mask=half < HALF, other=0.0).to(tl.float32)
            second *= factor * tl.load(norm + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
    if HALF > 0:
        first, second = first * c - second * s, second * c + first * s
    if REST == 0:
        rest = first
    if HALF == 0:
        first, second = rest, rest
    return first, second, rest


@triton.jit
def _store(at, there, first, second, rest, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """What ``_head`` returns, to heads at ``at`` [N, 1]."""
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    half, others = _columns(HALF), _columns(REST)
    if REST > 0:
        tl.store(at + 2 * HALF + others, narrow(rest, at.dtype.element_ty), mask=there & (others < REST))
    if HALF > 0:
        tl.store(at + half, narrow(first, at.dtype.element_ty), mask=there & (half < HALF))
        tl.store(at + HALF + half, narrow(second, at.dtype.element_ty), mask=there & (half < HALF))


@triton.jit
def _magnitudes(x):
    """Bits of |x|, which are in its order as whole numbers, with NaN above all: a maximum must not hide it."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _scale(magnitude, LARGEST: tl.constexpr):
    """From the bits of the largest element: float16, rounded up, and 1 instead of 0."""
    exact = magnitude.to(tl.float32, bitcast=True) / LARGEST
    scale = exact.to(tl.float16)
    above = (scale.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    scale = tl.where(scale.to(tl.float32) < exact, above, scale)
    return tl.where(exact == 0.0, 1.0, scale).to(tl.float16)
