"""Batches for attention, and what comes out of them in float64, written without a look at the code under test."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quire.backends.cuda.cache import DTYPES, LARGEST, LayerKV
from quire.backends.cuda.kernels.attention_configs import prefill_config
from quire.backends.cuda.tiles import SPLIT, DecodeScratch, DecodeTiles, packed_size, prefill_tiles, write_decode_tiles

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Batch:
    """Sequences with random keys and values in scattered blocks. Every position that nobody may read is NaN, scales included."""

    lengths: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int = 0
    dtype: torch.dtype = torch.float32
    kv_dtype: str = "float32"
    counts: list[int] = field(default_factory=list)
    """Queries of each sequence; decode: one each."""
    seed: int = 0
    has_sinks: bool = False
    softcap: float = 0.0

    def __post_init__(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        size, dim = self.block_size, self.head_dim
        self.counts = self.counts or [1] * len(self.lengths)
        self.scale = dim**-0.5
        width = max(-(-n // size) for n in self.lengths) + 2
        order = torch.randperm(len(self.lengths) * width + 3, generator=rng)
        num_blocks = len(order)
        self.tables = order[: len(self.lengths) * width].view(len(self.lengths), width).to(torch.int32)
        shape = (num_blocks, self.kv_heads, size, dim)
        exact = torch.randn((2, *shape), generator=rng)
        stored, scales = _stored(exact, self.kv_dtype)
        self.kv = LayerKV(stored[0], stored[1], *((None, None) if scales is None else (scales[0], scales[1])))
        self.keys = stored[0].double() if scales is None else stored[0].double() * scales[0].double()[..., None]
        self.values = stored[1].double() if scales is None else stored[1].double() * scales[1].double()[..., None]

        readable = torch.zeros((num_blocks, size), dtype=torch.bool)
        for row, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            begin = max(length - count + 1 - self.window, 0) if self.window else 0
            for position in range(begin, length):
                readable[self.tables[row, position // size], position % size] = True
            self.tables[row, : begin // size] = -1
        for numbers in (self.kv.keys, self.kv.values, self.kv.key_scales, self.kv.value_scales):
            if numbers is not None and numbers.dtype.is_floating_point:
                mask = ~readable[:, None, :].expand(numbers.shape[:3])
                numbers.view(torch.uint8 if numbers.itemsize == 1 else numbers.dtype)[mask] = 0x7F if numbers.itemsize == 1 else torch.nan

        total = sum(self.counts)
        fused = torch.randn((total, (self.heads + 2 * self.kv_heads) * dim), generator=rng).to(self.dtype)
        self.q = fused[:, : self.heads * dim].unflatten(1, (self.heads, dim))
        self.sinks = 2 * torch.randn(self.heads, generator=rng) if self.has_sinks else None
        self.rows = torch.arange(len(self.lengths), dtype=torch.int32)
        self.query_start = torch.tensor([0, *np.cumsum(self.counts)], dtype=torch.int32)

    def decode(self, ops, chosen: list[int] | None = None, programs: int = 3) -> Tensor:
        """The output of the sequences ``chosen`` (all), in one launch."""
        chosen = list(range(len(self.lengths))) if chosen is None else chosen
        lengths = np.array([self.lengths[s] for s in chosen], dtype=np.int32)
        capacity = int(sum(max(1, -(-int(n) // SPLIT)) for n in lengths))
        packed = np.full(packed_size(len(chosen), capacity), 123456, dtype=np.int32)
        write_decode_tiles(packed, lengths, self.window)
        scratch = DecodeScratch(len(chosen), capacity, self.heads, self.kv_heads, self.head_dim, torch.device("cpu"))
        for numbers in (scratch.partial, scratch.maxima, scratch.sums):
            numbers.fill_(torch.nan)
        tiles = DecodeTiles(torch.from_numpy(packed), len(chosen), scratch, programs)
        out = torch.full((len(chosen), self.heads, self.head_dim), torch.nan, dtype=self.dtype)
        for _ in range(2):  # a launch leaves the scratch as it found it
            ops.decode(self.q[chosen], self.kv, self.tables, self.rows[chosen], torch.from_numpy(lengths), tiles, self.scale, self.window,
                       out, self.sinks, self.softcap)  # fmt: skip
            assert not scratch.arrived.any()
        return out

    def prefill(self, ops, parts: list[tuple[int, int, int]] | None = None) -> Tensor:
        """The output of ``parts``, in one launch: (sequence, from which, to which of its queries); all of them."""
        parts = [(s, 0, n) for s, n in enumerate(self.counts)] if parts is None else parts
        index = [int(self.query_start[s]) + i for s, start, end in parts for i in range(start, end)]
        starts = np.cumsum([0] + [end - start for _, start, end in parts], dtype=np.int32)
        lengths = np.array([self.lengths[s] - self.counts[s] + end for s, _, end in parts], dtype=np.int32)
        rows = self.rows[[s for s, _, _ in parts]]
        config = prefill_config(self.head_dim, self.block_size, self.dtype, DTYPES[self.kv_dtype])
        tiles = torch.from_numpy(prefill_tiles(starts, lengths, config.rows, self.window))
        out = torch.full((len(index), self.heads, self.head_dim), torch.nan, dtype=self.dtype)
        ops.prefill(self.q[index], self.kv, self.tables, rows, torch.from_numpy(starts), torch.from_numpy(lengths), tiles, self.scale,
                    self.window, out, self.sinks, self.softcap)  # fmt: skip
        return out

    def expected(self) -> Tensor:
        """[queries, heads, head_dim] float64: softmax over the keys that a query may see, one query after the other."""
        out = []
        for row, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            for i in range(count):
                position = length - count + i
                begin = max(0, position + 1 - self.window) if self.window else 0
                where = torch.arange(begin, position + 1)
                blocks, inside = self.tables[row, where // self.block_size].long(), where % self.block_size
                keys = self.keys[blocks, :, inside].repeat_interleave(self.heads // self.kv_heads, 1)
                values = self.values[blocks, :, inside].repeat_interleave(self.heads // self.kv_heads, 1)
                q = self.q[int(self.query_start[row]) + i].double()
                scores = torch.einsum("hd,nhd->hn", q, keys) * self.scale
                if self.softcap:
                    scores = self.softcap * torch.tanh(scores / self.softcap)
                if self.sinks is not None:  # as a key whose value is 0
                    scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
                out.append(torch.einsum("hn,nhd->hd", scores.softmax(-1)[:, : len(where)], values))
        return torch.stack(out)


def _stored(exact: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor | None]:
    dtype = DTYPES[kv_dtype]
    if dtype not in LARGEST:
        return exact.to(dtype), None
    scales = (exact.abs().amax(-1) / LARGEST[dtype] * 1.001).half()
    numbers = exact / scales.float()[..., None]
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scales


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
