"""Weights of 8 bits (`--quantize`): a scale for each output channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quire.backends.cuda.cache import DTYPES, LARGEST

SLICE = 1 << 24
"""Elements that are there in float32 at the same time: 64 MB, twice."""


def quantize_weight(weight: Tensor, kind: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    """weight [N, K], any float type → (stored [N, K] int8 or float8_e4m3fn, scales [N] float32): weight ≈ stored * scales[:, None].

    A channel's largest element becomes the largest number of the type. Scales of channels that are all 0 are 1; of channels with an
    element that is not finite, neither is the scale.
    """
    dtype = DTYPES[kind]
    stored = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    rows = max(1, SLICE // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].float()
        scale = part.abs().amax(1) / LARGEST[dtype]
        scale[scale == 0] = 1  # 0, or so small that it became that: all numbers are 0
        numbers = part / scale[:, None]
        if dtype == torch.int8:
            numbers = numbers.round_()
        stored[start : start + rows] = numbers.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)  # scales near 0 are coarse
        scales[start : start + rows] = scale
    return stored, scales
