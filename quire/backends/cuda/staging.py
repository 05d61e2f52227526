"""Everything that a step needs from the host, in one copy: arrays of int32 end to end in pinned memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGN = 4
"""Arrays start at multiples of so many int32: 16 bytes."""
_BUFFERS = 3
"""Steps whose copies may still be on their way, and one more."""


class Staging:
    """``send`` copies arrays to the device; what it returns is valid until the next call, for work queued on the same stream.

    Arrays of the same sizes are at the same place each time, which captured steps count on; those behind them do not matter.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        """capacity: int32 of a step that are at the same place each time. More of them go elsewhere."""
        self.capacity = capacity
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._next = 0
        self._there = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._hosts: list[tuple[Tensor, npt.NDArray[np.int32], Any]] = []
        for _ in range(_BUFFERS if self._on_gpu else 1):
            host = self._host(capacity)
            self._hosts.append((host, host.numpy(), torch.cuda.Event() if self._on_gpu else None))

    def send(self, arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
        """The arrays, of int32 (or float32, bit for bit, then to be viewed as that), as int32 tensors on the device."""
        offsets, end = layout([array.size for array in arrays])
        there = self._there
        if end > self.capacity:
            host = self._host(end)
            numbers, event = host.numpy(), None
            there = torch.zeros(end, dtype=torch.int32, device=self._device)
        else:
            host, numbers, event = self._hosts[self._next]
            self._next = (self._next + 1) % len(self._hosts)
            if event is not None:
                event.synchronize()  # its last copy is _BUFFERS steps old
        for array, offset in zip(arrays, offsets, strict=True):
            numbers[offset : offset + array.size] = array.reshape(-1).view(np.int32)
        there[:end].copy_(host[:end], non_blocking=True)
        if event is not None:
            event.record()
        return [there[offset : offset + array.size] for array, offset in zip(arrays, offsets, strict=True)]

    def _host(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=self._on_gpu)


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of ``array``, from pinned memory: from elsewhere the host would wait for all that is queued before it."""
    host = torch.from_numpy(np.array(array, order="C"))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of ``sizes`` start, and where the last one ends."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // _ALIGN) * _ALIGN
    return offsets, at
