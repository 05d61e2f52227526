"""Watches the plans that an engine sends to its backend, and adds up what they ask of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

from quire.core.engine import Executor
from quire.core.plan import StepExtent, StepPlan, StepResult
from quire.machine import StepCost
from quire.models.spec import ModelCost
from quire.simulator.devices import Around


@dataclass(slots=True, frozen=True)
class Step:
    """What one step needed at least, and what it took."""

    sequences: int
    extent: StepExtent
    cost: StepCost
    seconds: float
    """In the backend."""


class Recorder(Around):
    """Stands between engine and backend, and changes nothing. Where steps overlap, a step takes from the end of the one before it to its
    own."""

    def __init__(self, backend: Executor, cost: ModelCost) -> None:
        super().__init__(backend)
        self.steps: list[Step] = []
        self.overlaps = backend.overlaps
        self._backend: Any = backend
        self._last_end = 0.0
        self._cost_of = cost.of

    def execute(self, plan: StepPlan) -> StepResult:
        start = perf_counter()
        result: StepResult = self._backend.execute(plan)
        self.steps.append(self._step(plan, perf_counter() - start))
        return result

    def launch(self, plan: StepPlan) -> tuple[StepPlan, float, Any]:
        return plan, perf_counter(), self._backend.launch(plan)

    def collect(self, pending: tuple[StepPlan, float, Any]) -> StepResult:
        plan, start, inner = pending
        result: StepResult = self._backend.collect(inner)
        end = perf_counter()
        self.steps.append(self._step(plan, end - max(start, self._last_end)))
        self._last_end = end
        return result

    def _step(self, plan: StepPlan, seconds: float) -> Step:
        extent = plan.extent(self.groups.window)
        return Step(len(plan.work), extent, self._cost_of(extent), seconds)
