"""Norms and activations."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from quire.models.spec import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467), of each row.

    x [T, H] float32, float16 or bfloat16; weight [H] of that type or float32. With residual [T, H], residual += x comes first, in
    place and rounded to its type, and the norm is that of residual. The result has x's type; it is in ``out`` where that is given, which
    may be x.
    """
    wide = _add(x, residual).float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
    return normed if out is None else out.copy_(normed)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al., arXiv 1607.06450), of each row. As ``rms_norm`` else."""
    wide = _add(x, residual).float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed if bias is None else normed + bias.float()).to(x.dtype)


def activate(x: Tensor, kind: Activation, gated: bool) -> Tensor:
    """x [T, 2F], gate beside up: act(gate) * up [T, F]; not gated: x [T, F], act(x). In float32; the result has x's type.
    ``swiglu_oai``, for gates alone, limits both: see models/spec.py."""
    if not gated:
        return _activation(x, kind).to(x.dtype)
    gate, up = x.chunk(2, -1)
    up = up.float()
    if kind == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1.0
    return (_activation(gate, kind) * up).to(x.dtype)


def softcap(x: Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place; x [T, N]."""
    x.copy_(cap * torch.tanh(x.double() / cap))  # float64: see ``_activation``


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return x
    return residual.copy_(residual.float() + x.float())


def _activation(x: Tensor, kind: Activation) -> Tensor:
    # In float64: a vector's last, partly filled register is computed by other code in PyTorch, so that the last bits of float32
    # depended on how many rows there are.
    x = x.double()
    match kind:
        case "silu":
            y = x / (1 + torch.exp(-x))
        case "gelu":
            y = x * 0.5 * torch.erfc(-x / sqrt(2))
        case "gelu_tanh":
            y = x / (1 + torch.exp(-2 * sqrt(2 / torch.pi) * (x + 0.044715 * x**3)))
        case "swiglu_oai":
            y = x / (1 + torch.exp(-1.702 * x))
        case "relu":
            y = torch.relu(x)
    return y.float()
