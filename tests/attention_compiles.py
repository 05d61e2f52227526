"""Compiles the attention kernels for sm_90 and prints a table of what came out; fails where that is not good enough.

python tests/attention_compiles.py [all | decode | prefill]: all configurations, or those of one kernel; else a few that stand for them.
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from compiled_launches import Compiled, compile_kernel
from quire.backends.cuda.cache import DTYPES, LayerKV
from quire.backends.cuda.kernels import attention
from quire.backends.cuda.kernels.attention_configs import kind
from quire.backends.cuda.tiles import DecodeScratch, DecodeTiles, packed_size

WIDE = r"LDGSTS\.\S*128"
# (dtype, KV dtype, head size, block size, query heads of a KV head, window); each stands for what compiles like it.
COMMON = [
    ("bfloat16", "bfloat16", 128, 64, 4, 0), ("bfloat16", "bfloat16", 128, 16, 8, 0), ("float16", "float16", 64, 32, 4, 0),
    ("bfloat16", "bfloat16", 96, 64, 1, 0), ("bfloat16", "bfloat16", 256, 32, 2, 1024), ("bfloat16", "int8", 128, 64, 4, 0),
    ("float16", "fp8", 64, 16, 4, 0), ("float32", "float32", 128, 16, 4, 0),
]  # fmt: skip
TYPES = [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "int8"), ("float16", "int8"), ("bfloat16", "fp8"),
         ("float16", "fp8"), ("bfloat16", "float16"), ("float32", "float32"), ("float32", "int8"), ("float32", "fp8"),
         ("float32", "bfloat16")]  # fmt: skip
ALL = [(*types, *shape, 4, 0) for types in TYPES for shape in product([64, 96, 128, 256], [16, 32, 64])]
ALL += [(*types, *shape, 8, 1024) for types in TYPES[::2] for shape in product([64, 128, 256], [16, 64])]
ALL += [(*types, head_dim, 64, group, 0) for types in TYPES[:3] for head_dim in (64, 128) for group in (1, 16, 32, 64)]


def launches(dtype: str, kv_dtype: str, head_dim: int, block_size: int, group: int, window: int) -> list[attention.Launch]:
    """Decode and prefill with 8 KV heads."""
    kv_heads, heads = 8, 8 * group
    numbers = torch.zeros((1, kv_heads, block_size, head_dim), dtype=DTYPES[kv_dtype])
    scales = torch.zeros((1, kv_heads, block_size), dtype=torch.float16) if kv_dtype in ("int8", "fp8") else None
    kv = LayerKV(numbers, numbers, scales, scales)
    q = torch.zeros((1, (heads + 2 * kv_heads) * head_dim), dtype=DTYPES[dtype])[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    table, one = torch.zeros((1, 513), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    scratch = DecodeScratch(1, 1, heads, kv_heads, head_dim, torch.device("cpu"))
    tiles = DecodeTiles(torch.zeros(packed_size(1, 1), dtype=torch.int32), 1, scratch, 1)
    out = torch.zeros((1, heads, head_dim), dtype=q.dtype)
    return [
        attention._decode(q, kv, table, one, one, tiles, 0.1, window, out),
        attention._prefill(q, kv, table, one, one, one, torch.zeros((1, 2), dtype=torch.int32), 0.1, window, out),
    ]


def faults(launch: attention.Launch, done: Compiled) -> list[str]:
    """What is wrong with a kernel."""
    keys, queries, constants = launch.arguments["keys"], launch.arguments["queries"], launch.constants
    tile = constants["TILE"] * constants["DIM_PAD"] * keys.itemsize
    name = kind(queries.dtype, keys.dtype)
    decode = "SPLIT" in constants
    checks = {
        "spills": done.stack == 0 and not done.count("LDL.*") and not done.count("STL.*"),
        "too little room on a multiprocessor": done.programs_per_sm >= launch.config.programs_per_sm,
        "no loads of 128 bits": done.count(r"(LDGSTS|LDG)\.\S*128") > 0,
    }
    if name in ("same", "float32"):
        checks["no asynchronous loads of 128 bits"] = done.count(r"LDGSTS\.\S*128") == done.count(r"LDGSTS\.\S*") > 0
        checks["no second buffer for K and V"] = done.shared >= 4 * tile
    if name in ("same", "converted"):
        checks["no tensor cores"] = done.count(r"HG?MMA\.\S*") > 0
        if not decode:
            checks["no wgmma"] = done.count(r"HGMMA\.\S*") > 0
    return [fault for fault, fine in checks.items() if not fine]


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    print(f"{'':8}{'queries':10}{'KV':10}{'head':>5}{'block':>6}{'group':>6}{'window':>7}{'tile':>10}{'warps':>6}{'stages':>7}"
          f"{'registers':>10}{'stack':>6}{'shared':>8}{'per SM':>7}{'HGMMA':>6}{'HMMA':>5}{'LDGSTS':>7}{'.128':>5}")  # fmt: skip
    bad = 0
    for case in ALL if wanted else COMMON:
        for name, launch in zip(("decode", "prefill"), launches(*case), strict=True):
            if wanted not in ("", "all", name):
                continue
            done = compile_kernel(launch.kernel, launch.arguments, launch.constants, launch.options)
            wrong = faults(launch, done)
            bad += bool(wrong)
            size = f"{launch.constants.get('ROWS') or launch.constants['GROUP_PAD']} x {launch.constants['TILE']}"
            dtype, kv_dtype, head_dim, block_size, group, window = case
            print(f"{name:8}{dtype:10}{kv_dtype:10}{head_dim:5}{block_size:6}{group:6}{window:7}{size:>10}{launch.config.warps:6}"
                  f"{launch.config.stages:7}{done.registers:10}{done.stack:6}{done.shared:8}{done.programs_per_sm:7}"
                  f"{done.count('HGMMA.*'):6}{done.count('HMMA.*'):5}{done.count('LDGSTS.*'):7}"
                  f"{done.count(WIDE):5}  {', '.join(wrong)}", flush=True)  # fmt: skip
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
