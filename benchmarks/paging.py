"""What paging costs in the attention kernel: blocks of 8, 16 and 32 in random order against contiguous memory.

    python benchmarks/paging.py [--rounds 9] [--pool 256] [--threads N] [--offset 0] [--json FILE] [--only WORDS]

Every layout cuts the same memory, and they take turns; printed are medians, over the rounds, of the ratio of two times within
a round. For shuffled blocks of each size: "run" over consecutive blocks of that size; "256" over consecutive blocks of 256
positions (of the whole context, where that is shorter); "best" over whatever consecutive layout was the fastest.
"near" is the time with blocks shuffled only among neighbours (256 KiB of keys) over "run": what it leaves out against full
shuffling is the cost of translating addresses all over the pool, which is large where the host maps memory in 4 KiB pages.

A measurement goes through tables that cover a pool of --pool MiB, one call after the other, as the layers of a model are gone
through: the KV of a call has left the caches when it is asked for again. Prefill: 256 queries, the last of their context.
--offset: bytes from a cache line's start to that of the pool; 16 is where numpy puts a large array by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native

SHAPES = {"12/12x64": (12, 12, 64), "32/8x64": (32, 8, 64), "32/8x128": (32, 8, 128)}
"""Heads / KV heads x head_dim; the first is llama-160m."""
BLOCKS, LARGEST = (8, 16, 32), 256
DECODE = [(batch, context) for batch in (1, 8, 32) for context in (128, 256, 512, 1024, 2048, 4096)]
PREFILL = [256, 1024, 4096]
PREFILL_CALLS = 2


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    batch: int
    context: int
    queries: int

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind:7} {self.shape:9} {self.dtype} batch {self.batch:2} context {self.context:4}"


@dataclass(frozen=True)
class Layout:
    block: int
    shuffled: bool
    near: bool = False


CONTIGUOUS = Layout(LARGEST, False)
RUNS = [CONTIGUOUS] + [Layout(block, False) for block in BLOCKS]
LAYOUTS = RUNS + [Layout(block, True, near) for block in BLOCKS for near in (False, True)]
OVER = ("run", "256", "best", "near")
NEAR = 1 << 18


class Pool:
    """Memory that every layout cuts in its own way; finite numbers, whichever element a layout takes them for."""

    def __init__(self, mebibytes: int, offset: int) -> None:
        self.bytes, self.offset = mebibytes << 20, offset
        self._arrays: dict[str, list[npt.NDArray[Any]]] = {}

    def arrays(self, dtype: str, elements: int) -> list[npt.NDArray[Any]]:
        """Two of ``elements``, for keys and values."""
        held = self._arrays.get(dtype)
        if held is None or held[0].size < elements:
            self._arrays.clear()
            values = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(dtype)
            held = self._arrays[dtype] = [self._placed(np.resize(one, elements)) for one in (values, values[::-1])]
        return held

    def _placed(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        memory = np.empty(values.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + self.offset
        placed = memory[start : start + values.nbytes].view(values.dtype)
        placed[:] = values
        return placed


def work_of(case: Case, layout: Layout, pool: Pool) -> tuple[Callable[[], None], int]:
    """A function that makes all calls of a measurement, and the bytes of KV that they read."""
    heads, kv_heads, dim = SHAPES[case.shape]
    position = kv_heads * dim * np.dtype(case.dtype).itemsize * 2
    block = min(layout.block, case.context)
    positions = max(pool.bytes // position, case.batch * case.context) // LARGEST * LARGEST
    calls, per_sequence = positions // (case.batch * case.context), case.context // block
    if case.queries > 1:
        calls = min(calls, PREFILL_CALLS)
    keys, values = (a[: positions * kv_heads * dim] for a in pool.arrays(case.dtype, positions * kv_heads * dim))
    key_cache, value_cache = keys.reshape(-1, kv_heads, dim, block), values.reshape(-1, kv_heads, block, dim)
    rng = np.random.default_rng(1)
    ids = np.arange(positions // block)
    stretch = max(2, 2 * NEAR // (position * block)) if layout.near else len(ids)
    if layout.shuffled:
        ids = np.concatenate([rng.permutation(ids[i : i + stretch]) for i in range(0, len(ids), stretch)])
    tables = ids[: calls * case.batch * per_sequence].astype(np.int32).reshape(calls, case.batch, per_sequence)
    rows = np.arange(case.batch, dtype=np.int32)
    query_start = np.arange(case.batch + 1, dtype=np.int32) * np.int32(case.queries)
    start = np.full(case.batch, case.context - case.queries, np.int32)
    queries = rng.standard_normal((case.batch * case.queries, heads, dim), np.float32)
    out = np.empty((len(queries), heads * dim), np.float32)

    def work() -> None:
        for table in tables:
            native.paged_attention(queries, key_cache, value_cache, out, table, rows, query_start, start, dim**-0.5)

    return work, calls * case.batch * case.context * position


def measure(case: Case, pool: Pool, rounds: int) -> dict[str, Any]:
    works = {layout: work_of(case, layout, pool) for layout in LAYOUTS}
    times: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    for turn in range(rounds + 1):  # the first is not counted
        at = turn % len(LAYOUTS)
        for layout in LAYOUTS[at:] + LAYOUTS[:at]:
            start = perf_counter()
            works[layout][0]()
            times[layout].append(perf_counter() - start)

    def ratio(a: Layout, b: Layout) -> float:
        return statistics.median(x / y for x, y in zip(times[a][1:], times[b][1:], strict=True))

    best = min(RUNS, key=lambda layout: statistics.median(times[layout][1:]))

    def over(block: int) -> dict[str, float]:
        runs = {"run": Layout(block, False), "256": CONTIGUOUS, "best": best}
        ratios = {name: ratio(Layout(block, True), run) for name, run in runs.items()}
        return ratios | {"near": ratio(Layout(block, True, True), runs["run"])}

    return {
        **asdict(case),
        "gb_s": {
            f"{layout.block} {'near' if layout.near else 'shuffled' if layout.shuffled else 'run'}": works[layout][1]
            / statistics.median(times[layout][1:])
            / 1e9
            for layout in LAYOUTS
        },
        "shuffled_over": {block: over(block) for block in BLOCKS},
    }


def cases(only: list[str]) -> Iterator[Case]:
    for shape in SHAPES:
        for dtype in ("float16", "float32"):
            several = [Case(shape, dtype, batch, context, 1) for batch, context in DECODE]
            several += [Case(shape, dtype, 1, context, 256) for context in PREFILL]
            yield from (case for case in several if all(f" {word} " in f" {case.name} " for word in only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pool", type=int, default=256, help="MiB of KV")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="words of the row to be printed, e.g. decode float16")
    parser.add_argument("--offset", type=int, default=0, help="bytes, a multiple of 4")
    parser.add_argument("--threads", type=int, default=native.num_threads())
    args = parser.parse_args()
    native.set_num_threads(args.threads)
    bandwidth, pool = native.measure_read_bandwidth(), Pool(args.pool, args.offset)
    print(f"{native.isa()}, {native.num_threads()} threads; read bandwidth {bandwidth:.1f} GB/s")
    print(f"{'GB/s: consecutive blocks of 256, shuffled of 16':61}" + "".join(f" |{block:3}: run   256  best  near" for block in BLOCKS))

    def line(name: str, over: dict[int, dict[str, float]]) -> None:
        columns = (" ".join(f"{over[block][what]:5.3f}" for what in OVER) for block in BLOCKS)
        print(f"{name:60}" + "".join(f" |  {column}" for column in columns), flush=True)

    results = []
    for case in cases(args.only):
        one = measure(case, pool, args.rounds)
        results.append(one)
        line(f"{case.name}  {one['gb_s']['256 run']:5.1f} {one['gb_s']['16 shuffled']:5.1f}", one["shuffled_over"])
    for what, chosen in (("decode", [r for r in results if r["queries"] == 1]), ("prefill", [r for r in results if r["queries"] > 1])):
        for name, take in (("median", statistics.median), ("worst", max)):
            if chosen:
                over = {b: {what: take([r["shuffled_over"][b][what] for r in chosen]) for what in OVER} for b in BLOCKS}
                line(f"{what}, {name} of {len(chosen)}", over)
    if args.json:
        args.json.write_text(json.dumps({"isa": native.isa(), "read_gb_s": bandwidth, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
