"""Devices that the engine can run on without a model: what bench memory and the simulator stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.core.engine import Executor, OverlappingExecutor
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.plan import StepPlan, StepResult
from quire.machine import Machine
from quire.models.spec import ModelCost
from quire.simulator.clock import SimulatedTime

_TOKENS = 1 << 30


@dataclass(slots=True, frozen=True)
class Words:
    """A vocabulary that is so large that random prompts have nothing in common by chance."""

    vocab_size: int = _TOKENS


class NoModel:
    """A device of ``num_blocks`` blocks that computes nothing. Its tokens depend on the row's seed and the position, so that
    no two samples are alike."""

    overlaps = False

    def __init__(self, num_blocks: int, block_size: int, max_model_len: int, groups: KVGroups = ONE_GROUP) -> None:
        self.spec = Words()
        self.num_blocks = num_blocks
        self.num_host_blocks = 0
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.groups = groups
        self._bases: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        bases = self._bases
        for start in plan.starts:
            bases[start.row] = start.seed * 0xD1B54A32D192ED03 >> 32
        tokens = [(bases[work.row] + work.start + work.count) % _TOKENS for work in plan.work if work.sample]
        return StepResult(tokens, [None] * len(tokens))


class Around:
    """What stands between an engine and its device, as large as the device."""

    def __init__(self, device: Executor) -> None:
        self.spec = device.spec
        self.num_blocks = device.num_blocks
        self.num_host_blocks = device.num_host_blocks
        self.block_size = device.block_size
        self.max_model_len = device.max_model_len
        self.groups = device.groups


class Forced(Around):
    """Ends every sequence at its length, with an end-of-text token, as if the model had chosen it: the engine does not know when.

    lengths: a sequence's seed → tokens that it generates. The requests must keep the model from ending them earlier
    (``min_tokens``). ``watch`` sees every plan after it was executed, or launched. device: one whose steps do not overlap;
    ForcedAhead is for those.
    """

    overlaps = False

    def __init__(self, device: Executor, lengths: Mapping[int, int], eos: int) -> None:
        super().__init__(device)
        self.watch: Callable[[StepPlan], None] = lambda plan: None
        self._device = device
        self._lengths = lengths
        self._eos = eos
        self._ends: dict[int, int] = {}
        """Row → tokens that it has at its end, less one."""
        self._beams: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        ending = self._ending(plan)
        result = self._end(ending, self._device.execute(plan))
        self.watch(plan)
        return result

    def _ending(self, plan: StepPlan) -> list[tuple[int, int]]:
        """(number among the rows that sample, row) of each that comes to its end in this step."""
        ends = self._ends
        for start in plan.starts:
            ends[start.row] = start.num_prompt + self._lengths[start.seed] - 1
            (self._beams.add if start.num_candidates else self._beams.discard)(start.row)
        sampled = [work for work in plan.work if work.sample]
        return [(i, work.row) for i, work in enumerate(sampled) if work.start + work.count >= ends[work.row]]

    def _end(self, ending: Sequence[tuple[int, int]], result: StepResult) -> StepResult:
        for i, row in ending:
            if row in self._beams:
                entry = result.logprobs[i]
                assert entry is not None, "a beam's row reports its candidates"
                entry.top = [(self._eos, 0.0)]
            else:
                result.tokens[i] = self._eos
        return result


class ForcedAhead(Forced):
    """The same on a device whose steps overlap."""

    overlaps = True

    def __init__(self, device: OverlappingExecutor, lengths: Mapping[int, int], eos: int) -> None:
        super().__init__(device, lengths, eos)
        self._ahead = device

    def launch(self, plan: StepPlan) -> tuple[list[tuple[int, int]], Any]:
        launched = self._ending(plan), self._ahead.launch(plan)
        self.watch(plan)
        return launched

    def collect(self, pending: tuple[list[tuple[int, int]], Any]) -> StepResult:
        ending, inner = pending
        return self._end(ending, self._ahead.collect(inner))


class Simulated(Around):
    """A device on which a step takes what ``machine`` says it takes. What a step says is ``device``'s, at once."""

    overlaps = False

    def __init__(self, device: Executor, machine: Machine, cost: ModelCost, time: SimulatedTime) -> None:
        super().__init__(device)
        self._device = device
        self._machine = machine
        self._cost = cost
        self._time = time

    def execute(self, plan: StepPlan) -> StepResult:
        self._time.pass_by(self._seconds(plan))
        return self._device.execute(plan)

    def _seconds(self, plan: StepPlan) -> float:
        return self._machine.seconds(self._cost.of(plan.extent(self.groups.window)))


class SimulatedAhead(Simulated):
    """The same where steps overlap, as on a GPU: a step begins when the one before it has ended, and the host waits for its tokens."""

    overlaps = True

    def __init__(self, device: Executor, machine: Machine, cost: ModelCost, time: SimulatedTime) -> None:
        super().__init__(device, machine, cost, time)
        self._free = 0.0
        """When the device has done all that it was given."""

    def launch(self, plan: StepPlan) -> tuple[StepResult, float]:
        self._free = max(self._free, self._time.now()) + self._seconds(plan)
        return self._device.execute(plan), self._free

    def collect(self, pending: tuple[StepResult, float]) -> StepResult:
        result, end = pending
        self._time.wait_until(end)
        return result
