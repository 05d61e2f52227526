"""Tile sizes, warps and pipeline stages of the attention kernels: one table for each, so that a tuning run can change them.

Chosen by what the compiler makes of them for sm_90 (tests/backends/cuda/compile_attention.py prints it): no spills, a second
buffer for K and V, and room for several programs on a multiprocessor. A tile of keys is a part of the arithmetic, the rest is not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["same", "converted", "float32", "float32 converted"]
"""Queries of 16 bits and KV of their type; of another type, which passes through registers; and the same of float32 queries, whose
products tensor cores do not do."""


@dataclass(slots=True, frozen=True)
class Config:
    tile: int
    """Keys of a tile; divides SPLIT."""
    warps: int
    stages: int
    programs_per_sm: int
    """Programs that fit on a multiprocessor at the same time, by registers and shared memory."""
    rows: int = 0
    """Prefill: queries of a tile."""
    registers: int | None = None
    """Bound for ptxas, which by itself may spill a few registers to reach an occupancy that it likes. Bounds that are near what it needs
    do worse than none."""


# (kind, padded head size) → configuration; with a block size behind it, for that block size only.
DECODE: dict[tuple[str, int] | tuple[str, int, int], Config] = {
    ("same", 64): Config(128, 4, 3, 3),
    ("same", 128): Config(64, 4, 3, 3),
    ("same", 256): Config(32, 4, 3, 2, registers=255),
    ("converted", 64): Config(64, 4, 3, 3, registers=168),
    ("converted", 128): Config(32, 4, 4, 4, registers=128),
    ("converted", 256): Config(32, 4, 3, 2, registers=255),
    ("float32", 64): Config(32, 8, 3, 3, registers=80),
    ("float32", 128): Config(32, 8, 3, 3),
    ("float32", 256): Config(16, 8, 3, 2),
    ("float32 converted", 64): Config(16, 8, 1, 2),
    ("float32 converted", 128): Config(16, 8, 1, 2),
    ("float32 converted", 256): Config(16, 8, 1, 1),
}
PREFILL: dict[tuple[str, int] | tuple[str, int, int], Config] = {
    ("same", 64): Config(64, 8, 3, 2, 128),
    ("same", 128): Config(64, 8, 3, 1, 128),
    ("same", 256): Config(32, 8, 2, 1, 128),
    ("converted", 64): Config(64, 8, 2, 1, 128),
    ("converted", 128): Config(32, 8, 2, 1, 128),
    ("converted", 256): Config(32, 8, 2, 1, 64),
    ("converted", 128, 64): Config(64, 8, 2, 1, 128),
    ("converted", 256, 16): Config(16, 8, 2, 1, 64),
    ("float32", 64): Config(16, 4, 3, 4, 16),
    ("float32", 128): Config(16, 4, 3, 4, 16),
    ("float32", 256): Config(16, 4, 3, 2, 16),
    ("float32 converted", 64): Config(16, 8, 1, 2, 16),
    ("float32 converted", 128): Config(16, 8, 1, 2, 16),
    ("float32 converted", 256): Config(16, 8, 1, 2, 16),
}


def padded(head_dim: int) -> int:
    """The head size of a tile: a power of two, at least the 16 that a product needs."""
    return max(16, 1 << (head_dim - 1).bit_length())


def kind(dtype: torch.dtype, kv_dtype: torch.dtype) -> Kind:
    if dtype == torch.float32:
        return "float32" if kv_dtype == dtype else "float32 converted"
    return "same" if kv_dtype == dtype else "converted"


LARGEST_HEAD = 256
"""Numbers of a head that a tile has room for."""
LARGEST = 227 * 1024
"""Bytes of shared memory that a program may have on a Hopper or Blackwell of a data centre, for which the tables were made; on an A100
163 KiB, on devices with a compute capability of 8.6, 8.9 or 12.0, which people have at home, 99."""
ROOM = 128 * 1024
"""With less, one stage or half of the queries fewer where the tables go to the limit."""
FEW = 4
"""Sequences up to which a program has its multiprocessor for itself, mostly: another tile on its way then makes up for others' programs."""


def decode_config(
    head_dim: int, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype, group: int, sequences: int, shared: int = LARGEST
) -> Config:
    """``dtype``: of queries. ``group``: query heads of a KV head, all in one tile; many of them take more warps. ``sequences``: of the
    launch; results do not hang on it. ``shared``: bytes of shared memory that a program may have."""
    name, size = kind(dtype, kv_dtype), max(64, padded(head_dim))
    config = DECODE.get((name, size, block_size)) or DECODE[name, size]
    if group > 32:
        config = replace(config, warps=8, programs_per_sm=1, registers=None)
    elif group > 16:
        config = replace(config, programs_per_sm=2)
    elif sequences <= FEW and config.stages > 1 and name == "same" and shared >= ROOM:
        config = replace(config, stages=config.stages + 1, programs_per_sm=config.programs_per_sm - 1)
    return config


def prefill_config(head_dim: int, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype, shared: int = LARGEST) -> Config:
    """``dtype``: of queries. ``shared``: bytes of shared memory that a program may have."""
    name, size = kind(dtype, kv_dtype), max(64, padded(head_dim))
    config = PREFILL.get((name, size, block_size)) or PREFILL[name, size]
    if (name, size) == ("same", 256) and shared < ROOM:
        config = replace(config, rows=config.rows // 2)
    return config
