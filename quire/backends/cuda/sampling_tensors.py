"""What the sampler draws under, of every row of a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class SamplingTensors:
    """One value a row, on the logits' device; limits as in SamplingParams."""

    temperature: Tensor
    """[N] float32; 0: the likeliest token."""
    top_k: Tensor
    """[N] int32; 0: all."""
    top_p: Tensor
    """[N] float32; 1 or more: all."""
    min_p: Tensor
    """[N] float32; 0: all."""
    seed: Tensor
    """[N] int64: the bits of an unsigned number."""
    position: Tensor
    """[N] int32 or int64: the number of tokens before the one that is drawn."""
    truncates: bool = True
    """Some row may have top_k, top_p or min_p. Where the host knows that none does, half of the launches are spared."""
