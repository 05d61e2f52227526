"""Watches the plans that an engine sends to its backend, and adds up what they ask of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

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
    """Weights once, and the KV of every sequence once; activations stay in caches and are left out."""
    seconds: float
    """In the backend."""


class Recorder:
    """Stands between engine and backend. Changes nothing."""

    def __init__(self, backend: Executor, spec: TransformerSpec, weight_bytes: int, head_bytes: int, kv_dtype: str) -> None:
        """weight_bytes, head_bytes: what a step reads, as the Backend tells it. kv_dtype: the width in memory."""
        self.steps: list[StepCost] = []
        self.spec = spec
        self.num_blocks = backend.num_blocks
        self.num_host_blocks = backend.num_host_blocks
        self.window = backend.window
        self.block_size = backend.block_size
        self.max_model_len = backend.max_model_len
        self._backend = backend
        self._layer_bytes = weight_bytes - head_bytes
        self._head_bytes = head_bytes
        self._kv_bytes = spec.kv_bytes_per_token(kv_dtype)

    def execute(self, plan: StepPlan) -> StepResult:
        start = perf_counter()
        result = self._backend.execute(plan)
        self.steps.append(self._cost(plan, perf_counter() - start))
        return result

    def _cost(self, plan: StepPlan, seconds: float) -> StepCost:
        keys = sum(w.start + w.count for w in plan.work)
        context = sum(_context(w.start, w.count) for w in plan.work)
        sampled = sum(1 + len(w.draft) for w in plan.work if w.sample)
        sampled_context = sum(_context(w.start + w.count - 1 - len(w.draft), 1 + len(w.draft)) for w in plan.work if w.sample)
        return StepCost(
            sequences=len(plan.work),
            tokens=plan.num_tokens,
            flops=self.spec.flops(plan.num_tokens, context, sampled, sampled_context),
            bytes_read=self._layer_bytes + (self._head_bytes if sampled else 0) + keys * self._kv_bytes,
            seconds=seconds,
        )


def _context(start: int, count: int) -> int:
    """Keys that ``count`` positions from ``start`` on attend to: position p to p + 1."""
    return count * (2 * start + count + 1) // 2
