"""A machine, described by data: what a step takes on it. Planner and simulator read this; ``quire bench steps`` measures it.

Linears take at least as long as their operations, or their weights to be read, whichever is longer (Williams et al., Roofline, CACM 2009).
What share of that limit is reached depends on how many operations there are for each byte, and on little else: few rows wait for memory,
many compute, and between the two a kernel does a little of both. Attention comes after it, and neither hides behind the other. So a
machine is two limits with a curve of shares, two speeds of attention, and the time of a step that is neither.
"""

from __future__ import annotations

import json
from bisect import bisect
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from quire.errors import ConfigError


@dataclass(slots=True, frozen=True)
class StepCost:
    """What a step asks of a machine; TransformerSpec.step_cost says how much that is."""

    linear_flops: int
    """Two for each multiply-add."""
    weight_bytes: int
    """Read once a step."""
    attention_flops: int
    kv_bytes: int
    """Of the KV cache, read once for each row."""

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops

    @property
    def bytes_read(self) -> int:
        return self.weight_bytes + self.kv_bytes


@dataclass(slots=True, frozen=True)
class Machine:
    """Raises ConfigError for numbers that no machine has."""

    name: str
    bytes_per_s: float
    """Memory reads, at most."""
    flops_per_s: float
    """Linears, at most: in float32, in int8 where weights are quantized, on a GPU in 16 bits."""
    reached: tuple[tuple[float, float], ...]
    """(operations for each byte of weights, share of the limit that linears reach), ascending. Between two points the share is
    interpolated in the logarithm of the first; outside it is the nearest point's. Above 1 where caches hold a part of the weights."""
    attention_bytes_per_s: float
    """KV that decoding rows read, as it is reached."""
    attention_flops_per_s: float
    """Prompts' attention, as it is reached."""
    step_s: float = 0.0
    """Of each step besides: scheduling, launches."""
    memory: int | None = None
    """Bytes of the device; None: what this machine has free."""
    source: str = ""
    """Where the numbers come from."""
    spread: float = 0.0
    """Relative error of a step's time that is to be expected, e.g. 0.1."""
    device: str = "cpu"
    """Quire's backend for it: ``cpu`` or ``cuda``."""
    weights: str = ""
    """The width of the weights that it was measured with, e.g. ``float32``, ``int8``; empty: any."""

    def __post_init__(self) -> None:
        speeds = [self.bytes_per_s, self.flops_per_s, self.attention_bytes_per_s, self.attention_flops_per_s]
        if not all(1e3 <= n <= 1e20 for n in speeds):  # NaN fails this too
            raise ConfigError(f"machine {self.name!r:.60}: its speeds must be from 1e3 to 1e20 a second")
        if not self.reached or not all(0 < x <= 1e9 and 0.001 <= share <= 1000 for x, share in self.reached):
            raise ConfigError(f"machine {self.name!r:.60}: reached must have operations for a byte above 0, and shares from 0.001 to 1000")
        if not (0 <= self.step_s <= 3600 and 0 <= self.spread <= 10) or not (self.memory is None or 0 < self.memory < 1 << 60):
            raise ConfigError(f"machine {self.name!r:.60}: step_s must be from 0 to 3600, spread from 0 to 10, memory above 0")
        if any(a[0] >= b[0] for a, b in pairwise(self.reached)):
            raise ConfigError(f"machine {self.name!r:.60}: the points of reached must ascend")

    def share(self, cost: StepCost) -> float:
        """Of their limit, that the linears of a step reach."""
        points = self.reached
        at = cost.linear_flops / max(1, cost.weight_bytes)
        after = bisect(points, at, key=lambda point: point[0])
        if after == 0:
            return points[0][1]
        if after == len(points):
            return points[-1][1]
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * log(at / x0) / log(x1 / x0)

    def linear_limit(self, cost: StepCost) -> float:
        """Least seconds of the linears of a step."""
        return max(cost.linear_flops / self.flops_per_s, cost.weight_bytes / self.bytes_per_s)

    def attention_seconds(self, cost: StepCost) -> float:
        return max(cost.attention_flops / self.attention_flops_per_s, cost.kv_bytes / self.attention_bytes_per_s)

    def device_seconds(self, cost: StepCost) -> float:
        """Seconds that the device takes for a step."""
        return self.linear_limit(cost) / self.share(cost) + self.attention_seconds(cost)

    def seconds(self, cost: StepCost) -> float:
        """Seconds from one step to the next."""
        return self.step_s + self.device_seconds(cost)

    def slower(self, factor: float) -> Machine:
        """One on which every step takes ``factor`` times as long."""
        return replace(
            self, bytes_per_s=self.bytes_per_s / factor, flops_per_s=self.flops_per_s / factor, step_s=self.step_s * factor,
            attention_bytes_per_s=self.attention_bytes_per_s / factor, attention_flops_per_s=self.attention_flops_per_s / factor,
        )  # fmt: skip

    @classmethod
    def load(cls, path: str) -> Machine:
        """From a file that ``quire bench steps --json`` wrote. Raises ConfigError."""
        try:
            made: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(
                f"--machine {path!r:.200} is neither a file ({e.strerror or e}) nor a device that is known by name: {', '.join(GPUS)}"
            ) from None
        except (ValueError, RecursionError):
            raise ConfigError(f"--machine {path}: this is not JSON: make it with quire bench steps --json FILE") from None
        table = made.get("machine") if isinstance(made, dict) else None
        known, speeds = {f.name for f in fields(cls)}, ("bytes_per_s", "flops_per_s", "attention_bytes_per_s", "attention_flops_per_s")
        if not isinstance(table, dict) or not {"name", "reached", *speeds} <= set(table) <= known:
            raise ConfigError(f"--machine {path}: this file holds no machine: make it with quire bench steps --json FILE")
        try:
            values: dict[str, Any] = {name: float(table[name]) for name in (*speeds, "step_s", "spread") if name in table}
            values["reached"] = tuple((float(x), float(y)) for x, y in table["reached"])
            values["memory"] = None if table.get("memory") is None else int(table["memory"])
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"--machine {path}: a value of the machine is no number: make it anew with quire bench steps --json FILE"
            ) from None
        values |= {name: str(table[name]) for name in ("name", "source", "device", "weights") if name in table}
        return cls(**values)


_REACHED = ((1.0, 0.92), (256.0, 0.92), (2048.0, 0.75))
_LAUNCH_S = 0.45e-3
"""With the attention below, these give the steps that were measured on an H200 (docs/benchmarks/cuda.md: Qwen3-0.6B and Llama-3.1-8B at 1,
32 and 256 rows, and prompts) to 11 %."""


def _gpu(name: str, gib: float, gb_per_s: float, tflops: float) -> Machine:
    """From a data sheet: memory in GiB, bandwidth in 10^9 bytes/s, dense products of bfloat16 with float32 sums in 10^12 operations/s."""
    bandwidth, products = 0.90e9 * gb_per_s, 0.80e12 * tflops
    return Machine(
        name, bandwidth, products, _REACHED, 0.8 * bandwidth, 0.59 * products, _LAUNCH_S, int(gib * (1 << 30)),
        f"its data sheet, {gb_per_s:,.0f} GB/s and {tflops:g} TFLOP/s, and the shares of them that were measured on an H200", 0.25, "cuda",
    )  # fmt: skip


GPUS = {
    "a10": _gpu("A10", 22.5, 600, 125),
    "a100-40gb": _gpu("A100 SXM 40GB", 39.5, 1555, 312),
    "a100": _gpu("A100 SXM 80GB", 79.2, 2039, 312),
    "h100": _gpu("H100 SXM 80GB", 79.2, 3350, 989.4),
    "h200": Machine("H200", 4.3e12, 788e12, _REACHED, 3.44e12, 465e12, _LAUNCH_S, int(139.8 * (1 << 30)),
                    "measured (docs/benchmarks/cuda.md)", 0.15, "cuda"),
    "l4": _gpu("L4", 22.5, 300, 121),
    "l40s": _gpu("L40S", 44.5, 864, 362),
    "rtx3090": _gpu("RTX 3090", 23.6, 936, 71),
    "rtx4090": _gpu("RTX 4090", 23.6, 1008, 165.2),
    "rtx5090": _gpu("RTX 5090", 31.4, 1792, 209.5),
}  # fmt: skip
"""Devices that are known without a measurement, by the name that ``--machine`` takes. Memory is what the driver leaves."""
