"""Paged attention in plain PyTorch: for tests, and for models small enough to be run on a CPU.

As in the kernels, tiles of keys lie at absolute positions and keys that a query may not see add exact zeros. Tiles of queries are
filled up to a fixed number of rows, so that each product has the same shape whatever is in the batch: a row's result depends on that row
only, and decode and prefill give the same bits. Lengths are read on the host, so it is not for CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.backends.cuda.cache import LayerKV
from quire.backends.cuda.tiles import DecodeTiles

ROWS = 16
"""Queries of a tile."""
TILE = 64
"""Keys of a tile."""


def decode(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, lengths: Tensor, tiles: DecodeTiles, scale: float, window: int,
           out: Tensor, sinks: Tensor | None = None, softcap: float = 0.0) -> None:  # fmt: skip
    """Attention of one query for each of S sequences, which is at the last of its positions.

    q: [S, heads, head_dim], float32, float16 or bfloat16; strided but for the last dimension. out: the same shape, contiguous.
    tables: [R, W] int32, the block tables of all rows; sequence s has tables[rows[s]]. Blocks that left the window are -1.
    rows, lengths: [S] int32. ``lengths``: keys, the query's own among them, whose KV is written already. 0: padding, whose row is any
        that exists; out is finite there.
    tiles: the decode list of the same lengths and window (the reference does without).
    scale: on scores. window: keys that a query sees, its own among them; 0: all.
    sinks: [heads] float32, a score of each head that takes part in the softmax and has no value; it is not scaled.
    softcap: scaled scores become softcap * tanh(score / softcap); 0: they stay.

    Drafts are sequences too: several queries of a row are as many sequences with the same row, and lengths one apart.
    """
    for sequence, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length == 0:
            out[sequence] = 0
        else:
            _attend(q[sequence : sequence + 1], kv, tables[row], length, scale, window, out[sequence : sequence + 1], sinks, softcap)


def prefill(q: Tensor, kv: LayerKV, tables: Tensor, rows: Tensor, query_start: Tensor, lengths: Tensor, tiles: Tensor, scale: float,
            window: int, out: Tensor, sinks: Tensor | None = None, softcap: float = 0.0) -> None:  # fmt: skip
    """Attention of several queries for each of S sequences, causal; they are at the last of its positions.

    q: [T, heads, head_dim] and out as in ``decode``. query_start: [S + 1] int32; sequence s has the queries ``query_start[s]`` to
    before ``query_start[s + 1]``. rows, lengths: [S] int32; keys of earlier chunks and of a cached prefix count, and come before.
    tiles: [N, 2] int32, of ``prefill_tiles`` for the same window (the reference does without).
    """
    starts = query_start.tolist()
    for sequence, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        start, end = starts[sequence], starts[sequence + 1]
        for first in range(start, end, ROWS):
            last = min(first + ROWS, end)
            _attend(q[first:last], kv, tables[row], length - end + last, scale, window, out[first:last], sinks, softcap)


def _attend(
    q: Tensor, kv: LayerKV, table: Tensor, length: int, scale: float, window: int, out: Tensor, sinks: Tensor | None, softcap: float
) -> None:  # fmt: skip
    """Up to ROWS queries at the positions before ``length``; online softmax (Milakov and Gimelshein, arXiv 1805.02867)."""
    count, heads, dim = q.shape
    kv_heads = kv.keys.shape[1]
    group = heads // kv_heads
    first = length - count
    begin = max(first - window + 1, 0) if window else 0
    tile = q.new_zeros((ROWS, heads, dim), dtype=torch.float32)
    tile[:count] = q
    queries = tile.view(ROWS, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * ROWS, dim)
    keys, values = _gather(kv.keys, kv.key_scales, table, begin, length), _gather(kv.values, kv.value_scales, table, begin, length)

    positions = (first + torch.arange(ROWS, device=q.device)).repeat(group)[:, None]
    largest = q.new_full((kv_heads, group * ROWS, 1), float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(largest)
    acc = torch.zeros_like(queries)
    origin = begin // TILE * TILE
    for start in range(origin, length, TILE):
        here = slice(start - origin, start - origin + TILE)
        key = start + torch.arange(TILE, device=q.device)[None, :]
        seen = (key <= positions) & (key < length)
        if window:
            seen &= key > positions - window
        scores = torch.bmm(queries, keys[:, here].transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, float("-inf"))
        higher = torch.maximum(largest, scores.amax(2, keepdim=True))
        reference = higher.masked_fill(higher == float("-inf"), 0.0)  # a query that has seen no key yet
        weights, decay = torch.exp(scores - reference), torch.exp(largest - reference)
        total = total * decay + weights.sum(2, keepdim=True)
        acc = acc * decay + torch.bmm(weights, values[:, here])
        largest = higher
    if sinks is not None:  # infinite where all scores are far below: what is divided by it becomes 0
        total = total + torch.exp(sinks.repeat_interleave(ROWS).view(kv_heads, group * ROWS, 1) - largest)
    result = acc / total.masked_fill(total == 0, 1.0)
    out.copy_(result.view(kv_heads, group, ROWS, dim).permute(2, 0, 1, 3).reshape(ROWS, heads, dim)[:count])


def _gather(numbers: Tensor, scales: Tensor | None, table: Tensor, begin: int, end: int) -> Tensor:
    """Keys or values of the positions begin .. end - 1 → [kv_heads, whole tiles, head_dim] float32, 0 where there are none."""
    _, kv_heads, block_size, dim = numbers.shape
    first_block = begin // block_size
    blocks = table[first_block : -(-end // block_size)].long()
    found = numbers[blocks].to(torch.float32)
    if scales is not None:
        found = found * scales[blocks].to(torch.float32)[..., None]
    found = found.transpose(0, 1).reshape(kv_heads, -1, dim)
    origin = begin // TILE * TILE
    tiles = found.new_zeros((kv_heads, -(-(end - origin) // TILE) * TILE, dim))
    tiles[:, begin - origin : end - origin] = found[:, begin - first_block * block_size : end - first_block * block_size]
    return tiles
