"""Attention beside the limits of the machine: decode, prefill, and sequences that share a prefix.

    python benchmarks/attention.py [decode] [prefill] [shared] [--heads 16 --kv-heads 8 --dim 128 --block 16] [--kv float16 int8]

Blocks are in random order in at least 256 MiB of KV, which a round goes through once. Best of the rounds; a shared machine gives
very different figures from one minute to the next, so compare only what one run prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.decoder import aligned

POOL = 256 << 20
GRID = [(batch, context) for batch in (1, 8, 32) for context in (128, 512, 2048, 8192) if batch * context <= 1 << 17]
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
Work = Callable[[], object]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.heads: int = args.heads
        self.kv_heads: int = args.kv_heads
        self.dim: int = args.dim
        self.block: int = args.block
        self.rounds, self.rng = args.rounds, np.random.default_rng(0)
        self.bandwidth, self.peak = native.measure_read_bandwidth(), native.measure_peak("float32")
        print(f"{native.isa()}, {native.num_threads()} threads; float32 peak {self.peak:.0f} GFLOP/s, read {self.bandwidth:.1f} GB/s")
        print(f"{self.heads} heads of {self.dim} over {self.kv_heads} KV heads, blocks of {self.block}")

    def caches(self, kv: str, blocks: int) -> tuple[list[npt.NDArray[Any]], dict[str, Any]]:
        """Keys and values, and their scales where there are any."""
        shape = (blocks, self.kv_heads)
        caches = [aligned((*shape, self.dim, self.block), kv), aligned((*shape, self.block, self.dim), kv)]
        values = self.rng.standard_normal(1 << 20, np.float32)
        for cache in caches:
            kind: dict[str, npt.NDArray[Any]] = {
                "int8": (values * 30).astype(np.int8),
                "bfloat16": (values.view(np.uint32) >> 16).astype(np.uint16),
            }
            cache.reshape(-1)[:] = np.resize(kind.get(kv, values.astype(kv if kv == "float16" else "float32")), cache.size)
        scales = {name: aligned((*shape, self.block), "float16") for name in ("k_scales", "v_scales")} if kv == "int8" else {}
        for scale in scales.values():
            scale[:] = 1 / 30
        return caches, scales

    def seconds(self, works: list[Work]) -> float:
        """Of one call; the best of the rounds."""
        times = []
        for _ in range(self.rounds + 1):
            start = perf_counter()
            for work in works:
                work()
            times.append((perf_counter() - start) / len(works))
        return min(times[1:])

    def work(self, caches: Any, tables: Any, starts: Any, count: int, scales: dict[str, Any], share: bool | None = None) -> Work:
        """Each row of tables computes ``count`` queries from its start on."""
        rows = np.arange(len(tables), dtype=np.int32)
        queries = self.rng.standard_normal((len(tables) * count, self.heads, self.dim), np.float32)
        out = np.empty((len(queries), self.heads * self.dim), np.float32)
        (keys, values), ends = caches, np.arange(len(tables) + 1, dtype=np.int32) * np.int32(count)
        starts, scale = np.asarray(starts, np.int32), self.dim**-0.5
        return lambda: native.paged_attention(queries, keys, values, out, tables, rows, ends, starts, scale, **scales, share=share)

    def calls(self, kv: str, blocks: int) -> int:
        return max(1, POOL // (2 * blocks * self.block * self.kv_heads * self.dim * WIDTHS[kv]))

    def decode(self, kv: str) -> None:
        for batch, context in GRID:
            blocks = batch * -(-context // self.block)
            calls = self.calls(kv, blocks)
            caches, scales = self.caches(kv, calls * blocks)
            tables = self.rng.permutation(calls * blocks).astype(np.int32).reshape(calls, batch, -1)
            seconds = self.seconds([self.work(caches, table, [context - 1] * batch, 1, scales) for table in tables])
            read = sum(a.nbytes for a in (*caches, *scales.values())) / calls / seconds / 1e9
            print(
                f"decode {kv:9} batch {batch:3} context {context:5} {seconds * 1e6:8.0f} us {read:6.1f} GB/s ({read / self.bandwidth:4.0%})"
            )

    def prefill(self, kv: str) -> None:
        for length in (512, 2048, 8192):
            blocks = -(-length // self.block)
            caches, scales = self.caches(kv, blocks)
            table = self.rng.permutation(blocks).astype(np.int32)[None]
            seconds = self.seconds([self.work(caches, table, [0], length, scales)])
            rate = 2 * self.heads * self.dim * length * (length + 1) / seconds / 1e9
            print(f"prefill {kv:9} {length:5} tokens {seconds * 1e3:8.2f} ms {rate:6.1f} GFLOP/s ({rate / self.peak:4.0%})")

    def shared(self, kv: str, batch: int = 32, prefix: int = 2048, own: int = 16) -> None:
        blocks, mine = prefix // self.block, -(-own // self.block)
        calls = self.calls(kv, blocks + batch * mine)
        caches, scales = self.caches(kv, calls * (blocks + batch * mine))
        ids = self.rng.permutation(calls * (blocks + batch * mine)).astype(np.int32).reshape(calls, -1)
        tables = [np.hstack([np.tile(one[:blocks], (batch, 1)), one[blocks:].reshape(batch, -1)]) for one in ids]
        starts = prefix + self.rng.integers(0, own, batch)
        shared, apart = (self.seconds([self.work(caches, t, starts, 1, scales, share) for t in tables]) for share in (None, False))
        rate = 4 * self.heads * self.dim * int((starts + 1).sum()) / shared / 1e9
        print(
            f"shared {kv:9} {batch} sequences over {prefix} {shared * 1e6:8.0f} us, else {apart * 1e6:8.0f} ({apart / shared:.2f} x), "
            f"{rate:6.1f} GFLOP/s ({rate / self.peak:4.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("decode", "prefill", "shared"), default=["decode", "prefill", "shared"])
    parser.add_argument("--kv", nargs="*", choices=tuple(WIDTHS), default=["float32", "float16", "int8"])
    for name, default in (("heads", 16), ("kv-heads", 8), ("dim", 128), ("block", 16), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    bench = Bench(args)
    for kv in args.kv:
        for what in args.what:
            getattr(bench, what)(kv)


if __name__ == "__main__":
    main()
