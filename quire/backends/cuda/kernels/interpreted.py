"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton is imported), on the CPU."""

from __future__ import annotations

from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""The interpreter multiplies the bits of bfloat16 as whole numbers in tl.dot: kernels convert to float32 before it."""
