"""Compiles the kernels of the layers for an H100 or H200, for shapes of models that people run, prints a table, and fails where they
spill, or do not read and write memory 128 bits at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled_kernels import MAX_SHARED, Case, Compiled, report
from quire.backends.cuda.cache import DTYPES, KVPool
from quire.backends.cuda.kernels import linear as products
from quire.backends.cuda.kernels.copies import copy_blocks
from quire.backends.cuda.kernels.kv_write import write_kv
from quire.backends.cuda.kernels.layers import activate, layer_norm, rms_norm, softcap
from quire.backends.cuda.turns import Turns

BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def rms(width: int, dtype: torch.dtype, added: bool) -> None:
    rms_norm(empty(4, width, dtype=dtype), empty(width, dtype=dtype), 1e-5, empty(4, width, dtype=dtype) if added else None)


def layer(width: int, dtype: torch.dtype) -> None:
    layer_norm(empty(4, width, dtype=dtype), empty(width), empty(width), 1e-5, empty(4, width, dtype=dtype))


def write(heads: int, kv_heads: int, head_dim: int, rotary_dim: int, kv_dtype: str, norm: bool = False, dtype: torch.dtype = BF16,
          scaled: bool = False) -> None:  # fmt: skip
    qkv = empty(4, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    pool = KVPool(1, 2, kv_heads, 64, head_dim, kv_dtype, torch.device("cpu"))
    angles = empty(64, rotary_dim // 2, dtype=F32)
    rope = Turns(angles, angles, empty(64, dtype=F32) if scaled else None) if rotary_dim else None
    weight = empty(head_dim, dtype=dtype) if norm else None
    ids = empty(4, dtype=torch.int32)
    write_kv(qkv, pool.layer(0), ids, ids, heads, rope, weight, weight)


def copy(kv_dtype: str) -> None:
    for memory in KVPool(2, 3, 8, 64, 128, kv_dtype, torch.device("cpu")).memories:
        copy_blocks(memory, memory, empty(2, 2, dtype=torch.int32))


def linear(tokens: int, kind: str, dtype: torch.dtype, depth: int = 4096, channels: int = 6144) -> None:
    weight = empty(channels, depth, dtype=DTYPES[kind])
    scales = empty(channels, dtype=F32) if weight.itemsize == 1 else None
    products.linear(empty(tokens, depth, dtype=dtype), weight, empty(channels), scales, same=tokens > 1)


def gated(tokens: int) -> None:
    products.gated_linear(empty(tokens, 4096), empty(28672, 4096), None, None, tokens > 1, "silu")


CALLS: dict[str, Callable[[], Any]] = {
    "rms 1024 bf16": partial(rms, 1024, BF16, False),
    "rms 4096 bf16 +residual": partial(rms, 4096, BF16, True),
    "rms 8192 bf16 +residual": partial(rms, 8192, BF16, True),
    "rms 4096 fp32": partial(rms, 4096, F32, False),
    "layer 768 fp16 +residual": partial(layer, 768, FP16),
    "layer 1000 bf16 +residual": partial(layer, 1000, BF16),
    "softcap 256000 bf16": lambda: softcap(empty(4, 256000), 30.0),
    "silu gated 14336 bf16": lambda: activate(empty(4, 2 * 14336), "silu", True),
    "gelu_tanh gated 3072 fp16": lambda: activate(empty(4, 6144, dtype=FP16), "gelu_tanh", True),
    "swiglu_oai gated 2880 bf16": lambda: activate(empty(4, 5760), "swiglu_oai", True),
    "gelu 3072 bf16": lambda: activate(empty(4, 3072), "gelu", False),
    "write 32/8/128 bf16": partial(write, 32, 8, 128, 128, "bfloat16"),
    "write 32/8/128 int8": partial(write, 32, 8, 128, 128, "int8"),
    "write 32/8/128 fp8": partial(write, 32, 8, 128, 128, "fp8"),
    "write 16/8/128 bf16 norms": partial(write, 16, 8, 128, 128, "bfloat16", True),
    "write 16/8/128 int8 norms": partial(write, 16, 8, 128, 128, "int8", True),
    "write 32/8/128 bf16 scaled": partial(write, 32, 8, 128, 128, "bfloat16", scaled=True),
    "write 14/2/64 bf16": partial(write, 14, 2, 64, 64, "bfloat16"),
    "write 12/12/64 fp16 no rotary": partial(write, 12, 12, 64, 0, "float16", dtype=FP16),
    "write 32/32/80 bf16 rotary 32": partial(write, 32, 32, 80, 32, "bfloat16"),
    "write 40/4/128 bf16": partial(write, 40, 4, 128, 128, "bfloat16"),
    "write 8/1/256 bf16": partial(write, 8, 1, 256, 256, "bfloat16"),
    "copy bf16": partial(copy, "bfloat16"),
    "copy int8, scales": partial(copy, "int8"),
    "linear bf16 T=1 K=3072": partial(linear, 1, "bfloat16", BF16, 3072),
    "linear bf16 T=1": partial(linear, 1, "bfloat16", BF16),
    "linear bf16 T=16 K=1024": partial(linear, 16, "bfloat16", BF16, 1024),
    "linear bf16 T=32 K=3072": partial(linear, 32, "bfloat16", BF16, 3072),
    "linear gated T=1": partial(gated, 1),
    "linear gated T=32": partial(gated, 32),
    "linear fp16 T=32": partial(linear, 32, "float16", FP16),
    "linear bf16 T=64": partial(linear, 64, "bfloat16", BF16),
    "linear bf16 T=512": partial(linear, 512, "bfloat16", BF16),
    "linear int8 T=1 bf16": partial(linear, 1, "int8", BF16),
    "linear int8 T=64 bf16": partial(linear, 64, "int8", BF16),
    "linear int8 T=512 bf16": partial(linear, 512, "int8", BF16),
    "linear int8 T=512 N=28672 bf16": partial(linear, 512, "int8", BF16, channels=28672),
    "linear fp8 T=1 bf16": partial(linear, 1, "fp8", BF16),
    "linear fp8 T=512 bf16": partial(linear, 512, "fp8", BF16),
    "linear int8 T=1 K=1000 bf16": partial(linear, 1, "int8", BF16, 1000),
    "linear int8 T=1 fp32": partial(linear, 1, "int8", F32),
}


def faults(case: str, kernels: list[Compiled]) -> Iterator[str]:
    launches = 2 if case in ("copy int8, scales", "linear gated T=1") else 1
    if len(kernels) != launches:
        yield f"{len(kernels)} launches instead of {launches}"
    for each in kernels:
        if each.registers > (232 if each.kernel == "_linear" else 64):
            yield f"{each.kernel}: too many registers"
        if each.shared > (MAX_SHARED if (each.kernel == "_linear" and each.stages > 4) or "bf16 T=512" in case else MAX_SHARED // 2):
            yield f"{each.kernel}: too much shared memory"
    if case.startswith(("rms", "silu", "swiglu", "gelu", "copy")) or case == "layer 768 fp16 +residual":
        yield from faults_of_rows(kernels[0], other_loads=2 if case.startswith("copy") else 0)  # the copy's pair
    if kernels[0].kernel == "_linear" and "fp32" not in case:
        yield from faults_of_products(kernels[0], 64 if "int8" in case or "fp8" in case else 128)


def faults_of_rows(kernel: Compiled, other_loads: int) -> Iterator[str]:
    """Rows are read and written 128 bits at a time."""
    if not kernel.count("LDG.128") or kernel.count("LDG.32", "LDG.64") != other_loads:
        yield "loads that are not of 128 bits"
    if not kernel.count("STG.128") or kernel.count("STG.32", "STG.64"):
        yield "stores that are not of 128 bits"


def faults_of_products(kernel: Compiled, width: int) -> Iterator[str]:
    """Weights go to shared memory while others are multiplied, and from there, those of 8 bits through registers, into the tensor
    cores. width: of loads, in bits."""
    if not kernel.count("HGMMA") or kernel.count("HMMA"):
        yield "not wgmma"
    if not kernel.count(f"LDGSTS.{width}"):
        yield "no asynchronous loads of weights"


if __name__ == "__main__":
    sys.exit(report([Case(name, calls, partial(faults, name)) for name, calls in CALLS.items()]) > 0)
