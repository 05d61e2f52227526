"""Compiles the sampler's kernels for sm_90, without a GPU, and prints what each needs as JSON. Run in a process without the interpreter."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.backends.cuda.kernels import adjustments, candidates, logprobs, sampling, selection

ROWS = {
    "logits": "*fp32", "stride": "i32", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32", "seed": "*i64",
    "position": "*i64", "maxima": "*fp32", "tops": "*fp32", "masses": "*fp64", "token": "*i32", "status": "*i32", "top": "*fp32",
    "total": "*fp64", "listed": "*i32", "number": "*i32", "bound": "*i32", "floor": "*fp32", "vocab": "i32", "chunks": "i32", "runs": "i32",
    "mask_words": "*i32", "mask_stride": "i32", "mask_index": "*i32", "start": "*i32", "ids": "*i32", "values": "*fp32", "tokens": "*i32",
    "tokens_stride": "i32", "rows": "*i32", "num_prompt": "*i32", "lengths": "*i32", "repetition": "*fp32", "frequency": "*fp32",
    "presence": "*fp32", "greater": "*i32", "logprob": "*fp32", "rank": "*i32", "log_sum": "*fp64", "width": "i32", "ids_stride": "i32",
    "count": "i32", "top_ids": "*i32", "top_logprobs": "*fp32",
}  # fmt: skip
"""The types of all arguments, by name."""
UNALIGNED = {"chunks", "width", "ids_stride", "count"}
KERNELS = {
    "scan": (selection.scan, 4, {}, {}),
    "scan bf16": (selection.scan, 4, {"logits": "*bf16"}, {}),
    "_draw": (sampling._draw, 8, {}, {"CHUNKS": 64}),
    "_draw bf16": (sampling._draw, 8, {"logits": "*bf16"}, {"CHUNKS": 64}),
    "_list_wanted": (candidates._list_wanted, 8, {}, {}),
    "_draw_truncated": (sampling._draw_truncated, 8, {}, {}),
    "scan small": (selection.scan, 4, {}, {"chunks": 1, "temperature": None}),
    "_draw small": (sampling._draw, 8, {}, {"chunks": 1, "CHUNKS": 1}),
    "_place sorted": (logprobs._place, 4, {}, {"SORTED": True}),
    "_restrict": (adjustments._restrict, 4, {}, {}),
    "_edit ban": (adjustments._edit, 4, {}, {"values": None}),
    "_edit bias": (adjustments._edit, 4, {}, {}),
    "_count": (adjustments._count, 4, {"counts": "*i32"}, {}),
    "_penalize": (adjustments._penalize, 4, {"counts": "*i32"}, {}),
    "_count_greater": (logprobs._count_greater, 4, {}, {}),
    "_report": (logprobs._report, 1, {}, {"CHUNKS": 64}),
    "_pick": (logprobs._pick, 8, {}, {}),
    "_place": (logprobs._place, 4, {}, {"SORTED": False}),
    "_draw_truncated bf16": (sampling._draw_truncated, 8, {"logits": "*bf16"}, {}),
}
"""Name → (kernel, warps, types that differ, constants). Triton makes a constant of a number that is 1."""
SEARCHES = ("_draw_truncated", "_pick")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def build(name):
    kernel, warps, types, constants = KERNELS[name]
    names = list(kernel.arg_names)
    signature = {n: "constexpr" if n in constants else types.get(n) or ROWS[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in UNALIGNED}
    source = ASTSource(kernel, signature, constexprs={(names.index(n),): value for n, value in constants.items()}, attrs=aligned)
    begin = time.time()
    limit = {"maxnreg": selection.MAX_REGISTERS} if name.split()[0] in SEARCHES else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps} | limit)
    seconds = time.time() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":") for part in usage.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    # What is spilled is on the stack.
    return {
        "warps": warps, "registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4", compiled.asm["ptx"])), "seconds": round(seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    assert "TRITON_INTERPRET" not in os.environ
    print(json.dumps({name: build(name) for name in sys.argv[1:] or KERNELS}))
