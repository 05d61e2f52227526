"""How queries and keys are rotated, as tables on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.models.spec import RopeSpec


@dataclass(slots=True, frozen=True)
class Turns:
    """Of each position, float32."""

    cos: Tensor
    """[max_len, rotary_dim / 2], as ``sin``"""
    sin: Tensor
    query_scales: Tensor | None = None
    """[max_len], a factor on rotated queries."""


def turns(rope: RopeSpec, positions: int, device: torch.device) -> Turns:
    """Angles in float32, as the models were trained with."""
    frequencies = torch.tensor(rope.inverse_frequencies(positions), dtype=torch.float32, device=device)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequencies
    scales = rope.query_scales(positions)
    query_scales = None if scales is None else torch.tensor(scales, dtype=torch.float32, device=device)
    return Turns(rope.magnitude * angles.cos(), rope.magnitude * angles.sin(), query_scales)
