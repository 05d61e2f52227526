"""What Triton and ptxas make of a kernel for sm_90 (Hopper), on a machine without a GPU: registers, spills, shared memory, instructions.

Not for processes in which kernels are interpreted (TRITON_INTERPRET).
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
REGISTERS, SHARED = 65536, 233472
"""Of a multiprocessor; bytes of shared memory. A program takes 1 KB besides its own (CUDA programming guide, compute capability 9.0)."""


@dataclass
class Compiled:
    warps: int
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread: what did not fit into registers."""
    shared: int
    """Bytes of a program."""
    assembly: str

    def count(self, instruction: str) -> int:
        """Instructions whose name matches a regular expression."""
        return len(re.findall(rf"\b{instruction}\b", self.assembly))

    @property
    def programs_per_sm(self) -> int:
        return min(REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps), SHARED // (self.shared + 1024))


def compile_kernel(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], options: dict[str, Any]) -> Compiled:
    """As a launch with these arguments would: tensors aligned to 16 bytes, whole numbers that 16 divides known to be so."""
    signature, known, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = constants[name] if name in constants else arguments[name]
        if name in constants or value is None:
            signature[name] = "constexpr"
            known[i,] = value
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else "fp32" if isinstance(value, float) else "i32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        assembly = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    return Compiled(options["num_warps"], found["REG"], found["STACK"], compiled.metadata.shared, assembly)
