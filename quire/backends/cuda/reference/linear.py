"""Matrix products with the weights of a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.backends.cuda.reference.layers import activate
from quire.models.spec import Activation

SLICE = 1024
"""Output channels whose weights are there in float64 at the same time."""
ROWS = 8
"""Of every product where a row's result must not depend on the others: libraries of a CPU sum in another order for another number."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, same: bool = False, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x · Wᵀ + bias [T, N], of x's type; in ``out`` where that is given.

    x [T, K] float32, float16 or bfloat16; weight [N, K] of that type, or int8 or float8_e4m3fn and then W = weight * scales, with scales
    [N] float32 or float16, see ``quantize_weight``; bias [N]. same: a row's result does not depend on the other rows. That of 8-bit
    weights never does.
    """
    if scales is not None:
        result = _quantized(x, weight, scales, bias)
    elif same:
        padded = F.pad(x, (0, 0, 0, -len(x) % ROWS))
        result = torch.cat([F.linear(part, weight, bias) for part in padded.split(ROWS)])[: len(x)]
    else:
        result = F.linear(x, weight, bias)
    return result if out is None else out.copy_(result)


def gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, same: bool, gate: Activation
) -> Tensor:  # fmt: skip
    """``activate`` of what ``linear`` makes of x, gate beside up: [T, N / 2]."""
    return activate(linear(x, weight, bias, scales, same), gate, True)


def _quantized(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    # In float64: the order in which a library sums depends on the number of rows, and what remains of that is then lost in rounding.
    wide = x.double()
    parts = [wide @ part.to(torch.float64).T for part in weight.split(SLICE)]
    out = torch.cat(parts, -1) * scales.double()
    return (out if bias is None else out + bias.double()).to(x.dtype)
