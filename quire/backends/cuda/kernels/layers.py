"""Norms and activations. A norm has one program for each row, with the whole row in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.programmatic import start_next, wait
from quire.backends.cuda.kernels.rounding import narrow
from quire.models.spec import Activation

MAX_COLUMNS = 1024
"""Of a program of ``activate``."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """As in reference/. Rows are contiguous; they may be apart (a part of the columns of another tensor)."""
    out, block, warps = _row(x, out)
    _norm.launch((x.shape[0],), (x, residual, weight, None, out, x.stride(0), out.stride(0), eps), (x.shape[1], block, False), warps=warps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """As in reference/. Rows are contiguous; they may be apart (a part of the columns of another tensor)."""
    out, block, warps = _row(x)
    _norm.launch((x.shape[0],), (x, residual, weight, bias, out, x.stride(0), out.stride(0), eps), (x.shape[1], block, True), warps=warps)
    return out


def activate(x: Tensor, kind: Activation, gated: bool) -> Tensor:
    """As in reference/. Rows are contiguous; they may be apart."""
    rows, width = x.shape
    width = width // 2 if gated else width
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())  # (Triton's own function takes a quarter of the launch)
    _activate.launch((rows, -(-width // block)), (x, out, x.stride(0)), (width, kind, gated, block))
    return out


def softcap(x: Tensor, cap: float) -> None:
    """As in reference/. Rows are contiguous; they may be apart."""
    rows, width = x.shape
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())
    _softcap.launch((rows, -(-width // block)), (x, x.stride(0)), (width, cap, block))


def _row(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, int, int]:
    """The result's memory; elements that hold a row, a power of two; and warps: 8 elements a thread, where there are not too many."""
    block = 1 << (x.shape[1] - 1).bit_length()
    warps = max(1, min(block // 256, 8 if block <= 8192 else 16))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out, block, warps


@Kernel
@triton.jit
def _norm(x, residual, weight, bias, out, x_stride, out_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    # Asked for first, so that they come while the row is summed.
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = 0.0
    if bias is not None:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    start_next(PDL)
    wait(PDL)
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        here = residual + row * WIDTH + columns
        added = narrow(tl.load(here, mask=inside, other=0.0).to(tl.float32) + wide, residual.dtype.element_ty)
        tl.store(here, added, mask=inside)
        wide = added.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps) * w + b
    tl.store(out + row * out_stride + columns, narrow(normed, out.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def _activate(x, out, x_stride, WIDTH: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    start_next(PDL)
    wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    here = x + row * x_stride + columns
    y = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    y = gated(y, tl.load(here + WIDTH, mask=inside, other=0.0).to(tl.float32), KIND) if GATED else activation(y, KIND)
    tl.store(out + row * WIDTH + columns, narrow(y, out.dtype.element_ty), mask=inside)


@Kernel
@triton.jit
def _softcap(x, x_stride, WIDTH: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = x + tl.program_id(0).to(tl.int64) * x_stride + columns
    y = capped(tl.load(here, mask=columns < WIDTH, other=0.0).to(tl.float32), CAP)
    tl.store(here, narrow(y, x.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP) of x in float32."""
    e = tl.exp(tl.abs(x) * (-2.0 / CAP))
    y = CAP * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """Of gates in float32, times what they gate."""
    if KIND == "swiglu_oai":
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1.0
    return activation(gate, KIND) * up


@triton.jit
def activation(a, KIND: tl.constexpr):
    """Of a in float32; swiglu_oai: see ``gated``."""
    if KIND == "silu":
        y = a / (1.0 + tl.exp(-a))
    elif KIND == "gelu":
        y = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        y = a / (1.0 + tl.exp(-1.5957691216057308 * (a + 0.044715 * a * a * a)))
    elif KIND == "swiglu_oai":
        y = a / (1.0 + tl.exp(-1.702 * a))
    else:
        tl.static_assert(KIND == "relu")
        y = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y
