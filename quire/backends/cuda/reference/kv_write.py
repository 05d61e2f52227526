"""Between the fused linear of queries, keys and values and attention: head norms, rotary, and the write into the KV pool."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.backends.cuda.cache import LARGEST, LayerKV
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
    """Norm each head of queries and keys, rotate them, put the queries back where they were, and keys and values into the pool.

    qkv [T, (num_heads + 2 * kv_heads) * head_dim]: queries, keys and values side by side; its keys and values stay as they are.
    positions [T] int32. slots [T] int32: block * block_size + position in the block; -1: its KV is in a block already, and is not
    written. rope: half-split (see RopeSpec); the leading rotary_dim dimensions are rotated, and those of queries multiplied by their
    scale. q_norm, k_norm [head_dim]: weights of the RMS norm of a head. All in float32, rounded once, when it is stored.

    int8 and fp8: each head's key, and value, is divided by its scale, its largest element by LARGEST rounded up to float16 (1 where
    all are 0), and rounded. Where an element is not finite nor is the scale, so that it is not hidden.
    """
    kv_heads, block_size, head_dim = kv.keys.shape[1:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    queries, keys, values = heads.split([num_heads, kv_heads, kv_heads], 1)
    if rope is not None or q_norm is not None:
        queries.copy_(_rotate(_norm(queries, q_norm, eps), positions, rope, rope and rope.query_scales))
    there = slots >= 0
    slots = slots[there].long()
    blocks, offsets = slots // block_size, slots % block_size
    rotated = _rotate(_norm(keys, k_norm, eps), positions, rope)
    for cache, scales, x in ((kv.keys, kv.key_scales, rotated), (kv.values, kv.value_scales, values.float())):
        stored = x[there]
        if scales is not None:
            stored, scales[blocks, :, offsets] = _quantize(stored, cache.dtype)
        cache[blocks, :, offsets] = stored.to(cache.dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.float()
    return x if weight is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotate(x: Tensor, positions: Tensor, rope: Turns | None, scales: Tensor | None = None) -> Tensor:
    """x [T, heads, head_dim] float32"""
    if rope is None:
        return x
    cos, sin = (table[positions.long()][:, None] for table in (rope.cos, rope.sin))
    if scales is not None:
        scale = scales[positions.long()][:, None, None]
        cos, sin = cos * scale, sin * scale
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] float32 → numbers in the range of ``dtype``, and scales [...] float16"""
    exact = x.abs().amax(-1) / LARGEST[dtype]
    scales = exact.half()
    scales = torch.where(scales.float() < exact, (scales.view(torch.int16) + 1).view(torch.float16), scales)
    scales = torch.where(exact == 0, 1, scales)
    numbers = x / scales.float()[..., None]
    return numbers.round() if dtype == torch.int8 else numbers, scales
