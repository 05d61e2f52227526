"""Watches the plans that an engine sends to its backend, and adds up what they ask of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from quire.core.engine import Executor
from quire.core.plan import StepPlan, StepResult
from quire.models.spec import TransformerSpec


@dataclass(slots=True, frozen=True)
class StepCost:
    """What one step needed at least, and what it took."""

    sequences: int
    tokens: int
    """Positions computed."""
    flops: int
    bytes_read: int
    seconds: float
    """In the backend."""


class Recorder:
    """Stands between engine and backend, and changes nothing. Where steps overlap, a step takes from the end of the one before it to its
    own."""

    def __init__(self, backend: Executor, spec: TransformerSpec, weight_bytes: int, head_bytes: int, kv_dtype: str) -> None:
        """weight_bytes, head_bytes: what a step reads, as the Backend tells it. kv_dtype: the width in memory."""
        self.steps: list[StepCost] = []
        self.spec = spec
        self.num_blocks = backend.num_blocks
        self.num_host_blocks = backend.num_host_blocks
        self.window = backend.window
        self.block_size = backend.block_size
        self.max_model_len = backend.max_model_len
        self.overlaps = backend.overlaps
        self._backend: Any = backend
        self._last_end = 0.0
        self._weight_bytes, self._head_bytes, self._kv_dtype = weight_bytes, head_bytes, kv_dtype

    def execute(self, plan: StepPlan) -> StepResult:
        start = perf_counter()
        result: StepResult = self._backend.execute(plan)
        self.steps.append(self._cost(plan, perf_counter() - start))
        return result

    def launch(self, plan: StepPlan) -> tuple[StepPlan, float, Any]:
        return plan, perf_counter(), self._backend.launch(plan)

    def collect(self, pending: tuple[StepPlan, float, Any]) -> StepResult:
        plan, start, inner = pending
        result: StepResult = self._backend.collect(inner)
        end = perf_counter()
        self.steps.append(self._cost(plan, end - max(start, self._last_end)))
        self._last_end = end
        return result

    def _cost(self, plan: StepPlan, seconds: float) -> StepCost:
        extent = plan.extent
        return StepCost(
            sequences=len(plan.work),
            tokens=extent.positions,
            flops=self.spec.flops(extent.positions, extent.context, extent.rows, extent.rows_context),
            bytes_read=self.spec.bytes_read(
                1,
                extent.sampling_steps,
                extent.keys,
                weight_bytes=self._weight_bytes,
                head_bytes=self._head_bytes,
                kv_dtype=self._kv_dtype,
            ),
            seconds=seconds,
        )
