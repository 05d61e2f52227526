"""From float32 to a narrower type, to the nearest and to even, also in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.backends.cuda.kernels.interpreted import INTERPRETED

_BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 as ``dtype``. int8: |x| <= 127; float8e4nv: |x| <= 448."""
    if dtype == tl.int8:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: behind it there is room for whole numbers only
    # The interpreter cuts bfloat16 off, and loses a carry into the exponent of fp8. It gets numbers that need no rounding.
    if _BY_HAND and dtype == tl.bfloat16:
        x = _shorten(x, 16)
    if _BY_HAND and dtype == tl.float8e4nv:
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, _shorten(x, 20))  # below 2**-6: multiples of 2**-9
    return x.to(dtype)


@triton.jit
def _shorten(x, BITS: tl.constexpr):
    """x without the last ``BITS`` of its mantissa."""
    bits = tl.where(x == x, x, 0.0).to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)) >> BITS << BITS
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
