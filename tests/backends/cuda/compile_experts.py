"""Compiles the kernels of mixtures of experts for an H100 or H200, for shapes of models that people run, prints a table, and fails where
they spill, do not bring weights 128 bits at a time while others are multiplied, or take more launches than they should."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from compile_layers import BF16, F32, FP16, empty, faults_of_products

from compiled_kernels import MAX_SHARED, Case, Compiled, report
from quire.backends.cuda.cache import DTYPES
from quire.backends.cuda.kernels import experts as kernels

MODELS = {"qwen3-30b": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "granite-1b": (32, 8, 1024, 512),
          "gpt-oss-20b": (32, 4, 2880, 2880), "glm-4.5-air": (128, 8, 4096, 1408)}  # fmt: skip
"""Experts, those of a row, hidden size, inner units."""


def mixture(model: str, rows: int, kind: str = "bfloat16", dtype: torch.dtype = BF16) -> None:
    experts, taken, hidden, inner = MODELS[model]
    up, down = (empty(experts, n, k, dtype=DTYPES[kind]) for n, k in ((2 * inner, hidden), (hidden, inner)))
    scales = [empty(*weight.shape[:2], dtype=F32) if weight.itemsize == 1 else None for weight in (up, down)]
    biased = model.startswith("gpt-oss")
    biases = [empty(*weight.shape[:2], dtype=dtype) if biased else None for weight in (up, down)]
    if model.startswith("glm"):
        chosen, weights = kernels.route(empty(rows, experts, dtype=F32), taken, True, True, empty(experts, dtype=F32), 2.5)
    else:
        chosen, weights = kernels.route(empty(rows, experts, dtype=dtype), taken, True)
    kernels.experts(
        empty(rows, hidden, dtype=dtype), up, biases[0], scales[0], down, biases[1], scales[1], chosen, weights,
        "swiglu_oai" if biased else "silu", False,
    )  # fmt: skip


CALLS: dict[str, Callable[[], Any]] = {
    **{f"qwen3-30b bf16 T={rows}": partial(mixture, "qwen3-30b", rows) for rows in (1, 32, 256, 512, 1024, 2048, 8192)},
    **{f"mixtral bf16 T={rows}": partial(mixture, "mixtral", rows) for rows in (1, 32, 256, 2048)},
    **{f"gpt-oss-20b bf16 T={rows}": partial(mixture, "gpt-oss-20b", rows) for rows in (1, 32, 256, 2048)},
    **{f"glm-4.5-air bf16 T={rows}": partial(mixture, "glm-4.5-air", rows) for rows in (1, 32, 2048)},
    **{f"gpt-oss-20b int8 T={rows}": partial(mixture, "gpt-oss-20b", rows, "int8") for rows in (1, 512)},
    "granite-1b fp16 T=64": partial(mixture, "granite-1b", 64, "float16", FP16),
    **{f"qwen3-30b int8 T={rows}": partial(mixture, "qwen3-30b", rows, "int8") for rows in (1, 256, 512, 2048)},
    **{f"qwen3-30b fp8 T={rows}": partial(mixture, "qwen3-30b", rows, "fp8") for rows in (32, 2048)},
    "granite-1b fp32 T=8": partial(mixture, "granite-1b", 8, "float32", F32),
}


def faults(case: str, kernels: list[Compiled]) -> Iterator[str]:
    names = ["_route", "_sort", "_experts", "_experts", "_combine"]
    if "T=1" in case.split():
        names.remove("_sort")
    if [each.kernel for each in kernels] != names:
        yield f"launches of {', '.join(each.kernel for each in kernels)}"
    for each in kernels:
        if each.registers > (240 if each.kernel == "_experts" else 64):
            yield f"{each.kernel}: too many registers"
        if each.shared > MAX_SHARED:
            yield f"{each.kernel}: too much shared memory"
        if each.kernel == "_experts" and "fp32" not in case:
            yield from faults_of_products(each, 64 if "int8" in case or "fp8" in case else 128)
    if not kernels[-1].count("LDG.128") or not kernels[-1].count("STG.128"):
        yield "_combine: loads or stores that are not of 128 bits"


if __name__ == "__main__":
    sys.exit(report([Case(name, calls, partial(faults, name)) for name, calls in CALLS.items()]) > 0)
