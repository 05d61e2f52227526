"""Programmatic dependent launches (CUDA programming guide): the programs of a kernel start while those of the kernel before it end, ask
for what does not depend on that, such as weights and tables, and wait for its results.

Every program of such a kernel waits, in whatever way it goes, and writes nothing before: so what is complete for one kernel is so for
all that follow it. Before it waits, it may read only what a step's kernels do not write.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from quire.backends.cuda.kernels.interpreted import INTERPRETED

LEAST_ARCH = 90
"""Hopper."""


@cache
def programmatic() -> bool:
    """Whether the device launches kernels so: what kernels take as PDL, and launches as launch_pdl."""
    return not INTERPRETED and driver.active.get_current_target().arch >= LEAST_ARCH


@triton.jit
def wait(PDL: tl.constexpr):
    """For the kernel before this one."""
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """The kernel behind this one, as soon as all programs of this one have come here. It should have no room yet where it would take it
    from programs of this one that are still to start."""
    if PDL:
        gdc_launch_dependents()
