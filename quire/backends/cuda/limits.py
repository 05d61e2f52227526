"""What the device can do, measured: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
_SIZE = {"cuda": 8192, "cpu": 768}
_LEAST_SIZE = 256
_REPEATS = 5


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy within the device's memory: the best of some."""
    source = torch.empty(min(_COPY_BYTES[device.type], _spare(device) // 2), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return 2 * source.nbytes / _best(device, lambda: destination.copy_(source))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (two for a multiply-add) of a product of large square matrices: the best of some."""
    n = _SIZE[device.type]
    while n > _LEAST_SIZE and 5 * n * n * 4 > _spare(device):
        n //= 2
    a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(device, lambda: a @ b)


def _spare(device: torch.device) -> int:
    """Bytes that measuring may take: the KV pool is there already, and has nearly all of the device."""
    if device.type != "cuda":
        return 1 << 40
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


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
