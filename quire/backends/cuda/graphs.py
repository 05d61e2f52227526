"""Decode steps as CUDA graphs: captured once for a few batch sizes, then run again with one launch.

A captured step reads its contents from the place in the staging memory where the host's one copy puts them, so replaying it needs no
other argument. Steps of fewer rows are padded with rows of length 0, which belong to the tables' spare row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 1
"""Runs before a capture: kernels are compiled and loaded, and libraries set up."""


def sizes(most: int) -> list[int]:
    """Batch sizes that are captured, for up to ``most`` rows: close to each other where padding would cost most."""
    steps = [1, 2, 4, *range(8, min(most, 256) + 1, 8), *range(256 + 64, most + 1, 64)]
    found = [size for size in steps if size < most]
    return [*found, most]


@dataclass(slots=True)
class Captured:
    replay: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]
    """What the replayed step has computed; valid until the next replay of any."""


class Graphs:
    """Captured steps by key: (rows, whether sampling truncates)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._memory: Any = None
        # One for all: cuBLAS keeps a workspace for each stream that it has met, of 32 MiB on Hopper.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def capture(self, key: tuple[int, bool], step: Callable[[], Sequence[Tensor]]) -> None:
        """``step`` queues the work, on memory that stays where it is, and returns its outputs. All graphs share memory for what is
        between: they run one after the other. Where there are no graphs, ``step`` itself is run again each time."""
        stream = self._stream
        if stream is None:
            self._captured[key] = Captured(lambda: None, step)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=stream):
            outputs = tuple(step())
        if self._memory is None:
            self._memory = graph.pool()
        self._captured[key] = Captured(graph.replay, lambda: outputs)

    def replay(self, key: tuple[int, bool]) -> Sequence[Tensor]:
        captured = self._captured[key]
        captured.replay()
        return captured.outputs()
