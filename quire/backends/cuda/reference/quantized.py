"""Matrix products with weights of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

SLICE = 1024
"""Output channels whose weights are there in float64 at the same time."""


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · (weight * scales)ᵀ + bias [T, N], of x's type.

    x [T, K] float32, float16 or bfloat16; weight [N, K] int8 or float8_e4m3fn, scales [N] float32 or float16, see ``quantize_weight``;
    bias [N]. A row's result does not depend on the other rows.
    """
    # In float64: the order in which a library sums depends on the number of rows, and what remains of that is then lost in rounding.
    wide = x.double()
    parts = [wide @ part.to(torch.float64).T for part in weight.split(SLICE)]
    out = torch.cat(parts, -1) * scales.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)
