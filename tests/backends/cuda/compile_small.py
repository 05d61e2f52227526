"""Compiles what takes most shared memory for a device with a compute capability of 8.9, whose programs have 99 KiB of it as those of 8.6
and 12.0 have, prints a table, and fails where a kernel takes more, or spills."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import compile_experts
import compile_layers
from compile_attention import Shape
from compile_layers import empty

from compiled_kernels import Case, Compiled, hopper, report
from quire.backends.cuda.kernels import linear as products

MAX_SHARED = 99 * 1024
CALLS: dict[str, Callable[[], Any]] = {
    f"linear bf16 T={tokens}": partial(products.linear, empty(tokens, 4096), empty(6144, 4096)) for tokens in (8, 32)
}
CALLS |= {
    name: compile_layers.CALLS[name]
    for name in ("linear gated T=32", "linear bf16 T=512", "linear int8 T=1 bf16", "linear int8 T=512 bf16")
}
CALLS |= {name: compile_experts.CALLS[name] for name in ("qwen3-30b bf16 T=1", "qwen3-30b bf16 T=1024", "mixtral bf16 T=2048")}
CALLS |= {name: compile_experts.CALLS[name] for name in ("qwen3-30b int8 T=256", "qwen3-30b int8 T=2048")}
for types in (("bfloat16", "bfloat16"), ("float16", "float16")):
    for head_dim in (64, 128, 256):
        shape = Shape(*types, head_dim, 64)
        CALLS |= {f"prefill {shape}": shape.prefill, f"decode {shape}": shape.decode}
        few = Shape(*types, head_dim, 64, sequences=1)
        CALLS[f"decode {few}"] = few.decode


def faults(kernels: list[Compiled]) -> Iterator[str]:
    if len(kernels) != 1 and kernels[0].kernel != "_route":
        yield f"{len(kernels)} launches"
    yield from (f"{kernel.shared:,} bytes of shared memory" for kernel in kernels if kernel.shared > MAX_SHARED)


if __name__ == "__main__":
    hopper().capability, hopper().max_shared = 89, MAX_SHARED
    sys.exit(report([Case(name, calls, faults) for name, calls in CALLS.items()]) > 0)
