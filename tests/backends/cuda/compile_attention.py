"""Compiles the attention kernels for an H100 or H200, prints a table, and fails where they spill, or lack tensor cores, loads that run
ahead, or the room that their configuration promises.

PYTHONPATH=.:tests python tests/backends/cuda/compile_attention.py [all | decode | prefill]: all configurations, or those of one kernel;
else a few that stand for them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from compiled_kernels import Case, Compiled, report
from quire.backends.cuda.cache import DTYPES, LayerKV
from quire.backends.cuda.kernels import attention
from quire.backends.cuda.kernels.attention_configs import FEW, Config, decode_config, kind, padded, prefill_config
from quire.backends.cuda.tiles import DecodeScratch, DecodeTiles, packed_size

KV_HEADS = 8


@dataclass(frozen=True)
class Shape:
    dtype: str
    kv_dtype: str
    head_dim: int
    block_size: int
    group: int = 4
    """Query heads of a KV head."""
    window: int = 0
    sequences: int = 256
    """Of a decode."""
    sinks: bool = False
    softcap: float = 0.0

    def __str__(self) -> str:
        few = f", {self.sequences} sequences" if self.sequences <= FEW else ""
        window = f" window {self.window}" if self.window else ""
        sinks = (", sinks" if self.sinks else "") + (", limited" if self.softcap else "")
        return f"{self.dtype}, KV {self.kv_dtype}, {self.group} of {self.head_dim}, blocks of {self.block_size}{window}{few}{sinks}"

    def sink(self) -> Tensor | None:
        return torch.zeros(KV_HEADS * self.group) if self.sinks else None

    def inputs(self) -> tuple[Tensor, LayerKV, Tensor]:
        """(queries, KV, where the output goes) of one query. Queries are a part of the fused projection, as in the model."""
        heads = KV_HEADS * self.group
        numbers = torch.zeros((1, KV_HEADS, self.block_size, self.head_dim), dtype=DTYPES[self.kv_dtype])
        scales = torch.zeros((1, KV_HEADS, self.block_size), dtype=torch.float16) if self.kv_dtype in ("int8", "fp8") else None
        fused = torch.zeros((1, (heads + 2 * KV_HEADS) * self.head_dim), dtype=DTYPES[self.dtype])
        q = fused[:, : heads * self.head_dim].unflatten(1, (heads, self.head_dim))
        return q, LayerKV(numbers, numbers, scales, scales), torch.zeros(q.shape, dtype=q.dtype)

    def decode(self) -> None:
        q, kv, out = self.inputs()
        scratch = DecodeScratch(self.sequences, 1, q.shape[1], KV_HEADS, self.head_dim, torch.device("cpu"))
        tiles = DecodeTiles(torch.zeros(packed_size(self.sequences, 1), dtype=torch.int32), self.sequences, scratch, 1)
        attention.decode(q, kv, TABLE, ONE, ONE, tiles, 0.1, self.window, out, self.sink(), self.softcap)

    def prefill(self) -> None:
        q, kv, out = self.inputs()
        tiles = torch.zeros((1, 2), dtype=torch.int32)
        attention.prefill(q, kv, TABLE, ONE, ONE, ONE, tiles, 0.1, self.window, out, self.sink(), self.softcap)


TABLE, ONE = torch.zeros((1, 513), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
# Each stands for what compiles like it.
COMMON = [
    Shape("bfloat16", "bfloat16", 128, 64), Shape("bfloat16", "bfloat16", 128, 16, 8), Shape("float16", "float16", 64, 32),
    Shape("bfloat16", "bfloat16", 96, 64, 1), Shape("bfloat16", "bfloat16", 256, 32, 2, 1024), Shape("bfloat16", "int8", 128, 64),
    Shape("float16", "fp8", 64, 16), Shape("float32", "float32", 128, 16), Shape("bfloat16", "bfloat16", 128, 64, sequences=1),
    Shape("bfloat16", "bfloat16", 64, 64, 8, 128, sinks=True), Shape("bfloat16", "fp8", 64, 64, 8, sinks=True),
    Shape("bfloat16", "bfloat16", 256, 32, 2, 4096, softcap=50.0), Shape("float16", "int8", 256, 16, 2, softcap=50.0),
]  # fmt: skip
TYPES = [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "int8"), ("float16", "int8"), ("bfloat16", "fp8"),
         ("float16", "fp8"), ("bfloat16", "float16"), ("float32", "float32"), ("float32", "int8"), ("float32", "fp8"),
         ("float32", "bfloat16")]  # fmt: skip
ALL = [Shape(*types, *sizes) for types in TYPES for sizes in product([64, 96, 128, 256], [16, 32, 64])]
ALL += [Shape(*types, *sizes, 8, 1024) for types in TYPES[::2] for sizes in product([64, 128, 256], [16, 64])]
ALL += [Shape(*types, head_dim, 64, group) for types in TYPES[:3] for head_dim in (64, 128) for group in (1, 16, 32, 64)]
ALL += [Shape(*types, 64, block, 8, window, sinks=True) for types in TYPES for block, window in ((16, 0), (64, 128))]
ALL += [Shape(*types, 256, block, 2, window, softcap=50.0) for types in TYPES for block, window in ((16, 0), (64, 4096))]
ALL += [Shape(*types, *sizes, sequences=1) for types in TYPES[:2] for sizes in product([64, 128, 256], [16, 64])]


def faults(shape: Shape, config: Config, kernels: list[Compiled]) -> Iterator[str]:
    if len(kernels) != 1:
        yield f"{len(kernels)} launches"
        return
    kernel = kernels[0]
    if (kernel.warps, kernel.stages, kernel.constants["TILE"]) != (config.warps, config.stages, config.tile):
        yield "another configuration"
    if kernel.programs_per_sm < config.programs_per_sm:
        yield "too little room on a multiprocessor"
    if not kernel.count("LDG.128", "LDGSTS.128"):
        yield "no loads of 128 bits"
    dtype, kv_dtype = DTYPES[shape.dtype], DTYPES[shape.kv_dtype]
    converts = kind(dtype, kv_dtype)
    if converts in ("same", "float32"):
        if not kernel.count("LDGSTS") or kernel.count("LDGSTS") != kernel.count("LDGSTS.128"):
            yield "asynchronous loads that are not of 128 bits"
        if kernel.shared < 4 * config.tile * padded(shape.head_dim) * kv_dtype.itemsize:
            yield "no second buffer for K and V"
    if converts in ("same", "converted") and not kernel.count(*(["HGMMA"] if config.rows else ["HMMA", "HGMMA"])):
        yield "no wgmma" if config.rows else "no tensor cores"


def case(name: str, shape: Shape) -> Case:
    numbers = shape.head_dim, shape.block_size, DTYPES[shape.dtype], DTYPES[shape.kv_dtype]
    config = decode_config(*numbers, shape.group, shape.sequences) if name == "decode" else prefill_config(*numbers)
    return Case(f"{name:7} {shape}", getattr(shape, name), partial(faults, shape, config))


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    names = [wanted] if wanted in ("decode", "prefill") else ["decode", "prefill"]
    return report([case(name, shape) for shape in (ALL if wanted else COMMON) for name in names])


if __name__ == "__main__":
    sys.exit(main() > 0)
