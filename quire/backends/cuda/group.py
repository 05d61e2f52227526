"""What devices that share a model do together: sum, put side by side, agree. Through torch.distributed: NCCL, or gloo on a CPU."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from quire.errors import ConfigError

TIMEOUT = timedelta(minutes=10)
"""Of one operation. The largest part of a model may take long to load."""


_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its name since PyTorch 2.13, and before."""


class Group:
    """``size`` processes, each with one device; this one is ``rank``. They meet through a file in ``folder``."""

    def __init__(self, rank: int, size: int, folder: Path, device: torch.device) -> None:
        self.rank, self.size, self._device = rank, size, device
        if dist.is_initialized():
            raise ConfigError(
                f"--tensor-parallel {size}: this process has opened a model on several devices already: start another one for this",
                param="tensor_parallel",
            )
        store = dist.FileStore(str(folder / "store"), size)
        options = {"device_id": device} if device.type == "cuda" else {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, **options)

    def reduce(self, x: Tensor) -> None:
        """The sum over all devices, in place, the same bytes on each."""
        dist.all_reduce(x)

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Each device's [rows, vocab / size, rounded up] side by side: [rows, vocab]."""
        rows, width = logits.shape
        parts = torch.empty((self.size * rows, width), dtype=logits.dtype, device=logits.device)
        _gather(parts, logits.contiguous())
        return parts.view(self.size, rows, width).transpose(0, 1).reshape(rows, self.size * width)[:, :vocab_size].contiguous()

    def share(self, x: Tensor) -> None:
        """What rank 0 has, on all."""
        dist.broadcast(x, 0)

    def least(self, number: int) -> int:
        """The smallest of all devices' numbers."""
        there = torch.tensor([number], dtype=torch.int64, device=self._device)
        dist.all_reduce(there, op=dist.ReduceOp.MIN)
        return int(there.item())
