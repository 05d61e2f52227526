"""Speed of the linear and of decode attention, beside the limits of the machine.

    python benchmarks/kernels.py [--rounds 5]

Linear: 6,144 x 1,024, over 16 sets of weights one after the other, so that they come from memory and not from a cache.
Attention: one layer, 32 sequences, 16 heads of 128 over 8 KV heads, block 16, blocks in random order. Best of the rounds; a
shared machine gives very different figures from one minute to the next, so compare only what one run prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np

from quire.backends.cpu import _native as native

N, K, SETS = 6144, 1024, 16
SEQUENCES, HEADS, KV_HEADS, DIM, BLOCK = 32, 16, 8, 128, 16


def best(work: Callable[[], None], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` calls, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times[1:])


def linear(rounds: int, peak: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((N, K), np.float32)
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 by truncation: only the speed matters
    for name, array in (("float32", weight), ("bfloat16", bits)):
        packed = [native.pack_linear(array) for _ in range(SETS)]
        for rows in (1, 8, 30, 64, 128, 512):
            x, out = rng.standard_normal((rows, K), np.float32), np.empty((rows, N), np.float32)

            def work(x: np.ndarray = x, out: np.ndarray = out, packed: list[native.PackedLinear] = packed) -> None:
                for one in packed:
                    native.linear(one, x, out)

            seconds = best(work, rounds) / SETS
            rate, read = 2 * rows * N * K / seconds / 1e9, packed[0].nbytes / seconds / 1e9
            print(f"linear {name:9} {rows:4} rows {rate:8.1f} GFLOP/s ({rate / peak:4.0%} of peak) {read:6.1f} GB/s of weights")


def attention(rounds: int, bandwidth: float) -> None:
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16"):
        for context in (128, 512, 2048):
            per_sequence = context // BLOCK
            blocks = SEQUENCES * per_sequence
            keys = rng.standard_normal((blocks, KV_HEADS, DIM, BLOCK), np.float32).astype(dtype)
            values = rng.standard_normal((blocks, KV_HEADS, BLOCK, DIM), np.float32).astype(dtype)
            tables = rng.permutation(blocks).astype(np.int32).reshape(SEQUENCES, per_sequence)
            rows, starts = np.arange(SEQUENCES, dtype=np.int32), np.arange(SEQUENCES + 1, dtype=np.int32)
            position = np.full(SEQUENCES, context - 1, np.int32)
            queries = rng.standard_normal((SEQUENCES, HEADS, DIM), np.float32)
            out = np.empty((SEQUENCES, HEADS * DIM), np.float32)
            arguments = (queries, keys, values, out, tables, rows, starts, position, DIM**-0.5)
            seconds = best(lambda arguments=arguments: native.paged_attention(*arguments), rounds)  # type: ignore[misc]
            read = (keys.nbytes + values.nbytes) / seconds / 1e9
            print(f"attention {dtype:9} context {context:5} {read:6.1f} GB/s of KV ({read / bandwidth:4.0%} of read bandwidth)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    peak, bandwidth = native.measure_fma_peak(), native.measure_read_bandwidth()
    print(f"{native.isa()}, {native.num_threads()} threads; float32 peak {peak:.0f} GFLOP/s, read bandwidth {bandwidth:.1f} GB/s")
    linear(args.rounds, peak)
    attention(args.rounds, bandwidth)


if __name__ == "__main__":
    main()
