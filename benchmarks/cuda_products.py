"""Tiles for products of a few rows: every candidate timed on the weights of a model's layer, beside what is taken now, one row without
tensor cores, and the library.

    python benchmarks/cuda_products.py [MODEL ...] [--rows 1 8 16 32] [--best 4] [--processes 12]

Models: as in cuda_models.py (Qwen3-0.6B, Llama-3.1-8B). Microseconds in a graph in which the weights of 24 layers take turns, so that
they come from memory; each kernel waits for the one before it, as in a step. "differs": the tile does not give the bits of the one
that is taken now. One row, and the library, do not activate: in a model a kernel of its own follows them. Candidates are compiled
by several processes first.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from cuda_kernels import seconds_in_graph  # noqa: E402
from cuda_models import SHAPES  # noqa: E402
from quire.backends.cuda.kernels import linear as products  # noqa: E402
from quire.backends.cuda.kernels.linear import Tiles  # noqa: E402
from quire.models.families import spec_from_config  # noqa: E402

LAYERS = 24
MAX_SHARED = 227 << 10
"""Bytes that a program may have on Hopper."""


def shapes(model: str) -> dict[str, tuple[int, int, Any]]:
    """Product → (channels, depth, gate)"""
    spec = spec_from_config(SHAPES[model])
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "qkv": (q + 2 * kv, spec.hidden_size, None),
        "o": (spec.hidden_size, q, None),
        "up": (2 * spec.intermediate_size, spec.hidden_size, spec.activation if spec.gated else None),
        "down": (spec.hidden_size, spec.intermediate_size, None),
    }


def candidates(rows: int) -> Iterator[Tiles]:
    """Fewer channels than tensor cores of Hopper's own kind take, 64, for more programs; those of before, with other pipelines."""
    tokens = 16 if rows <= 16 else 32
    for (channels, warps), depth, stages in itertools.product(((16, 1), (32, 1), (32, 2), (64, 2), (64, 4)), (128, 256), (4, 8)):
        if stages * (channels + tokens) * depth * 2 <= MAX_SHARED:
            yield Tiles(tokens, channels, depth, warps, stages)


def call(x: Tensor, weight: Tensor, out: Tensor, gate: Any, tiles: Tiles | None) -> None:
    """The kernel for several rows, with ``tiles`` or what it takes by itself."""
    if tiles is None:
        products._rows(x, weight, None, None, out, gate)
        return
    with patch.object(products, "choose", lambda *rest: tiles), patch.object(products, "MANY", 1 << 30):
        products._rows(x, weight, None, None, out, gate)


def compile_some(jobs: list[tuple[tuple[int, int, Any], int, Tiles | None]]) -> None:
    device = torch.device("cuda")
    for (channels, depth, gate), rows, tiles in jobs:
        x, weight = torch.zeros((rows, depth), dtype=torch.bfloat16, device=device), torch.zeros(1, dtype=torch.bfloat16, device=device)
        weight = weight.expand(channels, depth).contiguous()
        out = torch.empty((rows, channels if gate is None else channels // 2), dtype=torch.bfloat16, device=device)
        call(x, weight, out, gate, tiles)
    torch.cuda.synchronize()


def sweep(shape: tuple[int, int, Any], rows: int, best: int) -> str:
    channels, depth, gate = shape
    device = torch.device("cuda")
    session: Any = SimpleNamespace(device=device)
    x = torch.randn((rows, depth), device=device, dtype=torch.bfloat16)
    weights = torch.randn((LAYERS, channels, depth), device=device, dtype=torch.bfloat16).mul_(depth**-0.5)
    out = torch.empty((rows, channels if gate is None else channels // 2), dtype=torch.bfloat16, device=device)

    def time_of(work: Callable[[Tensor], object]) -> float:
        return 1e6 * seconds_in_graph(session, [partial(work, weight) for weight in weights], LAYERS)

    def time_with(tiles: Tiles | None) -> float:
        return time_of(lambda weight: call(x, weight, out, gate, tiles))

    call(x, weights[0], out, gate, None)
    wanted = out.clone()
    floor = weights[0].numel() * 2 / 4.2e12 * 1e6
    line = f"floor {floor:.1f}, now {time_with(None):.2f}"
    if rows == 1:
        line += f", one row {time_of(lambda w: products.linear(x, w)):.2f}"
    line += f", library {time_of(lambda w: F.linear(x, w)):.2f}"
    found = []
    for tiles in candidates(rows):
        try:
            out.fill_(float("nan"))
            call(x, weights[0], out, gate, tiles)
            same = torch.equal(out, wanted)
            found.append((time_with(tiles), tiles, "" if same else " differs"))
        except Exception as error:  # a tile that the compiler, or the device, does not take
            print(f"    {tiles}: {type(error).__name__}: {str(error)[:80]}")
    found.sort(key=lambda each: each[0])
    for time_us, t, note in found[:best]:
        line += f"\n      {time_us:6.2f}  {t.tokens} x {t.channels} x {t.depth}, {t.warps} warps, {t.stages} stages{note}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["Qwen3-0.6B", "Llama-3.1-8B"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--best", type=int, default=4, help="tiles that are shown (default: 4)")
    parser.add_argument("--processes", type=int, default=12, help="that compile (default: 12)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_products.py times kernels: it needs a GPU")
    start = time.monotonic()
    kinds = {max(16, rows) for rows in args.rows}  # fewer than 16 take the same kernels
    jobs: list[tuple[tuple[int, int, Any], int, Tiles | None]] = [
        (shape, rows, tiles) for model in args.models for shape in shapes(model).values() for rows in kinds for tiles in candidates(rows)
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.map(compile_some, [jobs[i :: 4 * args.processes] for i in range(4 * args.processes)], chunksize=1)
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s")
    for model in args.models:
        for name, shape in shapes(model).items():
            for rows in args.rows:
                print(f"{model} {name} {shape[0]} x {shape[1]}, {rows} rows: {sweep(shape, rows, args.best)}", flush=True)


if __name__ == "__main__":
    main()
