"""What Triton makes of kernels for an H100 or H200, without one: a driver that only says what the device is.

Runs in a process without TRITON_INTERPRET. Functions of quire.backends.cuda.kernels are called as they are, on CPU tensors (whose
memory is never touched, so they may be as large as a model's); launches compile, with the specializations that they would have.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Hopper:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(slots=True)
class Compiled:
    kernel: str
    """The function's name."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes; registers that are spilled go there."""
    shared: int
    """Bytes."""
    warps: int
    instructions: dict[str, int]
    """Opcodes with their width (LDG.128, LDGSTS.128, STG.64, HGMMA, LDL, ...), and how often they are there."""

    def count(self, opcode: str) -> int:
        """Of instructions of any width, or of the width that ``opcode`` has."""
        return sum(n for name, n in self.instructions.items() if name == opcode or name.startswith(opcode + "."))


def compile_calls(calls: Callable[[], Any]) -> list[Compiled]:
    """The kernels that ``calls`` launches, in their order."""
    driver.set_active(Hopper())
    launched = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append(kernel.result() if hasattr(kernel, "result") else kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        calls()
    finally:
        JITFunction.run = run
    return [_examine(kernel) for kernel in launched]


def _examine(kernel: Any) -> Compiled:
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    instructions: dict[str, int] = {}
    for opcode in re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code):
        parts = opcode.split(".")
        memory = parts[0] in ("LDG", "STG", "LDGSTS", "LDS", "STS")
        width = next((p for p in reversed(parts) if p in ("64", "128")), "32") if memory else ""
        name = f"{parts[0]}.{width}" if memory else parts[0]
        instructions[name] = instructions.get(name, 0) + 1
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK"))
    return Compiled(kernel.metadata.name, registers, stack, kernel.metadata.shared, kernel.metadata.num_warps, instructions)
