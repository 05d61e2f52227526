"""What the device can do, measured: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
_SIZE = {"cuda": 8192, "cpu": 768}
_REPEATS = 5


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy within the device's memory: the best of some."""
    source = torch.empty(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * source.nbytes / _best(device, lambda: destination.copy_(source))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (two for a multiply-add) of a product of large square matrices: the best of some."""
    n = _SIZE[device.type]
    a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(device, lambda: a @ b)


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = perf_counter()
            work()
            times.append(perf_counter() - began)
    return min(times[1:])
