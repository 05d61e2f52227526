"""Launches that take a quarter of the host's time that Triton's own take: a step with prompts of a small model waits for nothing else.

At each launch Triton finds out what it would compile the kernel for: types, aligned pointers, numbers that are 1 or multiples of 16,
options. Here that is a key of a few comparisons, and what Triton made for it the first time is launched again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

from torch import Tensor
from triton.runtime import driver

from quire.backends.cuda.kernels.attention_configs import LARGEST
from quire.backends.cuda.kernels.interpreted import INTERPRETED
from quire.backends.cuda.kernels.programmatic import programmatic

_ALIGNED = 16
"""Bytes, and what numbers are multiples of: Triton compiles for both."""
_LARGE = 1 << 31
Argument: TypeAlias = Tensor | float | None


class Kernel:
    """A Triton kernel, as a decorator above ``triton.jit``. Its arguments come first, then its constants; PDL is the last of these where
    it has one, and not passed (see programmatic.py)."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._waits = "PDL" in function.arg_names
        self._known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}

    def launch(
        self, grid: tuple[int, ...], arguments: Sequence[Argument], constants: tuple[Any, ...] = (), *, warps: int = 4,
        stages: int | None = None, registers: int | None = None, fuse: bool = True,
    ) -> None:  # fmt: skip
        """Queue ``grid`` programs on the current stream. Constants are hashable, and each is always of one type; stages: None for Triton's
        own number; registers: a bound for each thread; fuse: whether products that are followed by a sum may be rounded once."""
        passed: list[Any] = []
        kinds: list[Any] = []
        pointers = 0
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                pointers |= pointer
                passed.append(pointer)
                kinds.append(argument.dtype)
            else:
                passed.append(argument)
                kinds.append(_kind(argument) if type(argument) is int else type(argument))
        if INTERPRETED or pointers % _ALIGNED:
            self.launch_by_triton(grid, arguments, constants, warps=warps, stages=stages, registers=registers, fuse=fuse)
            return
        active = driver.active
        device = active.get_current_device()
        key = (device, warps, stages, registers, fuse, constants, *kinds)
        known = self._known.get(key)
        if known is None:
            compiled = self.launch_by_triton(grid, arguments, constants, warps=warps, stages=stages, registers=registers, fuse=fuse)
            self._known[key] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), (*constants, *self._pdl())
            return
        run, binary, constants = known
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), *binary, *passed, *constants)

    def launch_by_triton(
        self, grid: tuple[int, ...], arguments: Sequence[Argument], constants: tuple[Any, ...] = (), *, warps: int = 4,
        stages: int | None = None, registers: int | None = None, fuse: bool = True,
    ) -> Any:  # fmt: skip
        """As ``launch``, but Triton looks for what it compiled, and compiles where there is nothing; returns that."""
        options: dict[str, Any] = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": fuse}
        if stages is not None:
            options["num_stages"] = stages
        if self._waits:
            options["launch_pdl"] = programmatic()
        return self.function[grid](*arguments, *constants, *self._pdl(), **options)

    def _pdl(self) -> tuple[bool, ...]:
        return (programmatic(),) if self._waits else ()


def shared_memory() -> int:
    """Bytes of shared memory that a program may have on the current device."""
    return LARGEST if INTERPRETED else _shared_memory(driver.active, driver.active.get_current_device())


@cache
def _shared_memory(active: Any, device: int) -> int:
    return int(active.utils.get_device_properties(device)["max_shared_mem"])


def _kind(number: int) -> int:
    """What Triton may compile a kernel for: a 1, whole 16ths, any other; larger ones, which are not of 32 bits, each by itself."""
    if not -_LARGE < number < _LARGE:
        return number
    return 1 if number == 1 else _ALIGNED if number % _ALIGNED == 0 else 0
