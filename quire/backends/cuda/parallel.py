"""Tensor parallelism: the part of a model that one of several devices has (Shoeybi et al., Megatron-LM, arXiv 1909.08053, §3).

A transformation of the loaded tensors: heads and the inner width of the feed-forward are divided, so each device's ``o`` and ``down``
give a part of a sum, which two all-reduces a layer complete. lm_head is divided by tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.models.parallel import part_of
from quire.models.spec import TransformerSpec

Tensors = Mapping[str, npt.NDArray[Any]]


def shard(spec: TransformerSpec, tensors: Tensors, rank: int, size: int) -> tuple[TransformerSpec, dict[str, npt.NDArray[Any]]]:
    """Spec and tensors (views) of device ``rank`` of ``size``."""
    kept = {}
    for name, tensor in tensors.items():
        part = name.rsplit(".", 2)[-2]
        if part in ("q", "k", "v", "sinks", "gate", "up") or (spec.heads_as_one and part in ("q_norm", "k_norm")):
            kept[name] = _slice(tensor, 0, rank, size)
        elif part in ("o", "down"):
            if tensor.ndim == 2:
                kept[name] = _slice(tensor, 1, rank, size)
            elif rank == 0:  # a bias: once in the sum
                kept[name] = tensor
        elif name != "lm_head.weight":
            kept[name] = tensor
    kept["lm_head.weight"] = _vocabulary(tensors["embed.weight" if spec.tied else "lm_head.weight"], rank, size)
    return part_of(spec, size), kept


def _slice(tensor: npt.NDArray[Any], axis: int, rank: int, size: int) -> npt.NDArray[Any]:
    each = tensor.shape[axis] // size
    part = slice(rank * each, (rank + 1) * each)
    return tensor[part] if axis == 0 else tensor[:, part]


def _vocabulary(head: npt.NDArray[Any], rank: int, size: int) -> npt.NDArray[Any]:
    """Equal parts: the last one may end in tokens that there are not."""
    each = -(-len(head) // size)
    part = head[rank * each : (rank + 1) * each]
    missing = each - len(part)
    return np.concatenate([part, np.zeros((missing, head.shape[1]), head.dtype)]) if missing else part
