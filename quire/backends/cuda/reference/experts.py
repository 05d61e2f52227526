"""Mixtures of experts (Shazeer et al., arXiv 1701.06538): which feed-forwards a row takes, and what they make of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.backends.cuda.reference.layers import activate
from quire.backends.cuda.reference.linear import linear
from quire.models.spec import Activation

LEAST = 1e-20
"""Added to a sum of shares, which may all be 0."""


def route(
    scores: Tensor, taken: int, sum_to_one: bool, sigmoid: bool = False, correction: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ``taken`` experts with the highest scores of each row, the highest first and of equal ones the lower number, and their weights:
    their shares of the softmax of all scores, or the sigmoids of their own (sigmoid), divided by their sum (sum_to_one), times ``scale``.
    correction [E] float32: those are taken whose share with it added is the highest.

    scores [T, E] float32, float16 or bfloat16, contiguous, E >= taken → (chosen [T, taken] int32, weights [T, taken] float32). A row with
    a NaN takes the first experts, with weights that are NaN.
    """
    wide = scores.float()
    damaged = wide.isnan().any(1, keepdim=True)
    wide = torch.where(damaged, 0.0, wide)
    if sigmoid or correction is not None:
        shares = (torch.sigmoid(wide.double()) if sigmoid else torch.softmax(wide.double(), 1)).float()
        by = shares if correction is None else shares + correction
        damaged |= by.isnan().any(1, keepdim=True)
        order = torch.where(damaged, 0.0, by).sort(dim=1, descending=True, stable=True).indices[:, :taken]
        weights = shares.gather(1, order)
        if sum_to_one:
            weights = weights / (weights.sum(1, keepdim=True) + LEAST)
    else:
        ranked, order = wide.sort(dim=1, descending=True, stable=True)
        # In float64: see ``activate``.
        exact = torch.exp(ranked.double() - ranked[:, :1])
        total = exact[:, : taken if sum_to_one else None].sum(1, keepdim=True)
        order, weights = order[:, :taken], (exact[:, :taken] / total).float()
    return order.int(), torch.where(damaged, math.nan, weights * scale)


def experts(
    x: Tensor, up: Tensor, up_bias: Tensor | None, up_scales: Tensor | None, down: Tensor, down_bias: Tensor | None,
    down_scales: Tensor | None, chosen: Tensor, weights: Tensor, activation: Activation, same: bool,
) -> Tensor:  # fmt: skip
    """The sum of down[e] · act(up[e] · x + up_bias[e]) + down_bias[e] over the experts e that a row takes, times their weights, in the
    order of ``chosen``: [T, H], of x's type. What an expert gives is rounded to it, and the sum, in float32, once more.

    x [T, H] as in ``linear``, which says what weights, biases and scales may be; up [E, 2F, H], gate beside up, or [E, F, H] where there
    is no gate; down [E, H, F]; up_bias and up_scales [E, 2F] or [E, F], down_bias and down_scales [E, H]. chosen [T, taken] int32, no
    expert twice in a row, and weights [T, taken] float32, both contiguous: see ``route``. same: as in ``linear``.
    """
    parts = torch.empty((*chosen.shape, x.shape[1]), dtype=x.dtype, device=x.device)
    gated = up.shape[1] == 2 * down.shape[2]
    for expert in chosen.unique().tolist():
        row, choice = (chosen == expert).nonzero(as_tuple=True)
        inner = linear(x[row], up[expert], _of(up_bias, expert), _of(up_scales, expert), same)
        inner = activate(inner, activation, gated)
        parts[row, choice] = linear(inner, down[expert], _of(down_bias, expert), _of(down_scales, expert), same)
    total = torch.zeros(x.shape, device=x.device)
    for i in range(chosen.shape[1]):
        total += weights[:, i, None] * parts[:, i].float()
    return total.to(x.dtype)


def _of(stack: Tensor | None, expert: int) -> Tensor | None:
    return None if stack is None else stack[expert]
