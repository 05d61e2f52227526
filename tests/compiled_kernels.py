"""What Triton and ptxas make of kernels for an H100 or H200, on a machine without one.

Functions of quire.backends.cuda.kernels are called as they are, on CPU tensors (whose memory no kernel touches), under a driver that says
that the device is an H100, and keeps what is launched: so kernels compile with the specializations and options of real launches. Not for
processes in which kernels are interpreted (TRITON_INTERPRET).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS, SHARED, PROGRAMS, WARPS = 65536, 228 * 1024, 32, 64
"""Of a multiprocessor; bytes of shared memory (CUDA programming guide, compute capability 9.0)."""
MAX_SHARED, MAX_THREADS = 227 * 1024, 1024
"""Of a program."""
MEMORY = ("LDG", "STG", "LDGSTS", "LDS", "STS")


@dataclass
class Compiled:
    kernel: str
    """The function's name."""
    cubin: bytes
    shared: int
    """Bytes of a program."""
    warps: int = 0
    stages: int = 0
    constants: dict[str, Any] = field(default_factory=dict)
    """Of the launch: tile sizes, and numbers that Triton made constants of."""

    @cached_property
    def usage(self) -> dict[str, int]:
        found = self._examine("cuobjdump", "-res-usage")
        return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", found)}

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self.usage["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of a thread: what did not fit into registers, which is what LDL and STL read and write."""
        return self.usage["STACK"] + self.usage["LOCAL"]

    @property
    def programs_per_sm(self) -> int:
        """How many fit on a multiprocessor. Threads take registers in eights, a program 1 KB of shared memory besides its own."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, SHARED // (self.shared + 1024), WARPS // self.warps, PROGRAMS)

    @cached_property
    def instructions(self) -> dict[str, int]:
        """Opcode, and width of those that move memory (LDG.128, LDGSTS.128, STG.64, HGMMA, ...) → how often it is there. Takes half a
        second: for those whose instructions matter."""
        found: dict[str, int] = {}
        for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", self._examine("nvdisasm", "-c")):
            name, *rest = opcode.split(".")
            if name in MEMORY:
                name += "." + next((part for part in reversed(rest) if part in ("64", "128")), "32")
            found[name] = found.get(name, 0) + 1
        return found

    def count(self, *opcodes: str) -> int:
        """Instructions of any width, or of the width that is named."""
        return sum(n for name, n in self.instructions.items() if name in opcodes or name.split(".")[0] in opcodes)

    def _examine(self, tool: str, option: str) -> str:
        with TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.cubin)
            return subprocess.run([TOOLS / tool, option, path], capture_output=True, text=True, check=True).stdout


class Hopper:
    """As much of a Triton driver as launches ask for. They end in ``launched``, and in ``arguments`` what each was given: grid, stream,
    what Triton was called with. capability, max_shared: of another device, where these are set before anything is compiled."""

    def __init__(self) -> None:
        self.capability, self.max_shared = 90, MAX_SHARED
        self.launched: list[Compiled] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.max_shared}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Compiled, int, int, int]:
        """(module, function, registers, spills, threads): the function is what a launcher is given."""
        return name, Compiled(name, cubin, shared), 0, 0, MAX_THREADS

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}

        def launch(x: int, y: int, z: int, stream: int, function: Compiled, *arguments: Any) -> None:
            function.warps, function.stages, function.constants = metadata.num_warps, metadata.num_stages, constants
            self.launched.append(function)
            self.arguments.append((x, y, z, stream, *arguments))

        return launch


@cache
def hopper() -> Hopper:
    """The process's: kernels that are compiled stay with it."""
    only = Hopper()
    driver.set_active(only)
    return only


def compile_calls(calls: Callable[[], Any]) -> list[Compiled]:
    """The kernels that ``calls`` launches, in their order."""
    device = hopper()
    device.launched, device.arguments = [], []
    calls()
    return device.launched


@dataclass(slots=True)
class Case:
    name: str
    calls: Callable[[], Any]
    faults: Callable[[list[Compiled]], Iterator[str]]
    """What is wrong with the kernels that are launched."""


def report(cases: list[Case]) -> int:
    """Print a table of all kernels. Instructions are shown of those that were looked at. Returns the number of faults."""
    shown = ("LDG.128", "STG.128", "LDGSTS", "LDGSTS.128", "HMMA", "HGMMA")
    width = max(len(case.name) for case in cases)
    print(f"{'case':{width}} {'kernel':15} warps stages registers shared per-SM  {'  '.join(shown)}")
    count = 0
    for case in cases:
        kernels = compile_calls(case.calls)
        faults = [f"{k.kernel}: {k.spilled} bytes are spilled" for k in kernels if k.spilled] + list(case.faults(kernels))
        count += len(faults)
        for k in kernels:
            line = f"{case.name:{width}} {k.kernel:15} {k.warps:5} {k.stages:6} {k.registers:9} {k.shared:6} {k.programs_per_sm:6}"
            looked_at = shown if "instructions" in vars(k) else ()
            print(line, *(f" {k.count(name):{len(name)}}" for name in looked_at))
        for fault in faults:
            print(f"{case.name}: {fault}", flush=True)
    return count
