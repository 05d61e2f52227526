"""How long the steps of a model take on this machine, and the machine that this makes for planner and simulator.

The engine runs its own steps, replayed or captured as they are when it serves: so many sequences that decode, and prompts of several
lengths. From these come the share of their limit that linears reach at each number of positions; from steps that differ in their context
alone, the speed of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from statistics import fmean, median
from time import perf_counter

from tqdm import tqdm

from quire.bench.recorder import Recorder, Step
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.errors import ConfigError
from quire.llm import LLM
from quire.machine import Machine, StepCost
from quire.sampling_params import SamplingParams

SHORTEST = 64
"""Context in which steps can be told apart."""
SHORT = 16
"""Tokens of the prompts of sequences whose linears are to be timed."""
_SKIPPED = 3
"""First steps of a case, in which sequences start."""
PASSES = 3
"""Over all cases: what slows a machine down for a while does not slow down one case alone."""
ATTENTION_S = 15.0
"""Seconds that may be spent on computing the contexts that attention is timed at."""
_SEEN = 0.08
"""Share of a step's time that attention has to take for its speed to be told from it."""
DECODE_SHARE, PROMPT_SHARE = 0.78, 0.6
"""What attention reaches of the memory's speed, and of float32 arithmetic, where it can't be told. From docs/benchmarks/cpu.md."""
OVER_FLOAT = {"float32": 1.0, "bfloat16": 1.9, "int8": 4.0}
"""How much faster a CPU's other arithmetic is than that of float32, in which attention is computed."""


@dataclass(slots=True, frozen=True)
class Case:
    """Steps of one kind."""

    sequences: int
    positions: int
    """Computed, in all sequences together."""
    context: int
    """Keys that a sequence's last position attends to."""
    seconds: float
    cost: StepCost
    steps: int


@dataclass(slots=True, frozen=True)
class Steps:
    """The cases, and the machine that gives their times."""

    model: str
    machine: Machine
    cases: list[Case]


def run(config: EngineConfig, rounds: int) -> Steps:
    """rounds: steps of each kind in each pass. Raises what loading the model raises."""
    config = replace(config, speculation="off", prefix_caching=False)
    llm = LLM.from_config(config)
    if llm.backend.max_model_len < SHORTEST or config.max_num_batched_tokens < SHORT:
        raise ConfigError(
            f"steps can be told apart from --max-model-len {SHORTEST} and --max-num-batched-tokens {SHORT} on; these are "
            f"{llm.backend.max_model_len} and {config.max_num_batched_tokens}"
        )
    spec = llm.backend.spec
    config = config.as_stored(spec.quantized)
    bytes_per_s, flops_per_s = llm.backend.limits()
    recorder = Recorder(llm.backend, llm.cost())
    times = _Timing(Engine(recorder, config), recorder, config, rounds).times()
    single = flops_per_s / (OVER_FLOAT[llm.backend.arithmetic] if config.device == "cpu" else 1)
    machine = Machine(
        "this machine",
        bytes_per_s,
        flops_per_s,
        ((1.0, 1.0),),
        _speed(times.decode_pair, lambda cost: cost.kv_bytes) or DECODE_SHARE * bytes_per_s,
        _speed(times.prompt_pair, lambda cost: cost.attention_flops) or PROMPT_SHARE * single,
        step_s=times.host_s,
        source=f"measured with {config.model}",
        device="cpu" if config.device == "cpu" else "cuda",
        weights=config.quantize or config.weight_width(spec.dtype),
    )
    machine = replace(machine, reached=_curve(machine, [*times.decode, *times.prompts]))
    errors = sorted(abs(step.seconds / machine.device_seconds(step.cost) - 1) for step in recorder.steps[_SKIPPED:])
    spread = errors[len(errors) * 3 // 4]
    cases = [*times.decode, *(times.decode_pair or ())[1:], *times.prompts, *(times.prompt_pair or ())[1:]]
    return Steps(config.model, replace(machine, spread=round(spread, 3)), cases)


@dataclass(slots=True)
class _Times:
    decode: list[Case]
    """With short contexts."""
    prompts: list[Case]
    """From their beginning."""
    decode_pair: tuple[Case, Case] | None
    """The same sequences with a short and with a long context; None where the latter would take too long, or have no room."""
    prompt_pair: tuple[Case, Case] | None
    """The first and the last chunk of a long prompt."""
    host_s: float
    """Seconds of a step outside the backend, median."""


class _Timing:
    """Runs them on an engine."""

    def __init__(self, engine: Engine, recorder: Recorder, config: EngineConfig, rounds: int) -> None:
        self._engine, self._recorder, self._rounds = engine, recorder, rounds
        self._chunk = config.max_num_batched_tokens
        self._most = engine.limits.max_num_seqs
        self._room = engine.backend.max_model_len
        self._names, self._tokens = map(str, count()), Random(0).random
        self._host: list[float] = []
        self._progress = tqdm(desc="Timing steps", unit="step", delay=1, disable=None)

    def times(self) -> _Times:
        with self._progress:
            self._decode(1, SHORT)  # the first steps touch fresh memory and wake the threads
            longest = min(self._chunk, self._room - 1)
            decode: dict[int, list[Step]] = {rows: [] for rows in self._ladder() if self._fits(rows, SHORT)}
            prompts: dict[int, list[Step]] = {length: [] for length in sorted({*(n for n in (64, 128, 256) if n < longest), longest})}
            for _ in range(PASSES):
                for rows, steps in decode.items():
                    steps += self._decode(rows, SHORT)  # none where chunks are so small that the first have ended before the last begin
                for length, steps in prompts.items():
                    steps += self._drain([length], 1)
            cases = [_case(steps) for steps in prompts.values()]
            affordable = int(ATTENTION_S / cases[-1].seconds * longest)
            return _Times(
                [_case(steps) for steps in decode.values() if steps],
                cases,
                self._decode_pair(affordable),
                self._prompt_pair(min(4 * self._chunk, self._room - 1, affordable // 2) // self._chunk),
                median(self._host),
            )

    def _ladder(self) -> list[int]:
        most = min(self._most, self._chunk)
        return [2**i for i in range(13) if 2**i < most] + [most]

    def _decode_pair(self, affordable: int) -> tuple[Case, Case] | None:
        """affordable: tokens of prompts that there is time for."""
        context = min(1024, self._room // 2)
        rows = max((n for n in self._ladder() if n * context <= affordable and self._fits(n, context)), default=0)
        if not rows:
            return None
        before = self._decode(rows, SHORT)
        far = [step for _ in range(PASSES) for step in self._decode(rows, context)] if 3 * rows * context <= affordable else []
        far = far or self._decode(rows, context)
        return (_case([*before, *self._decode(rows, SHORT)]), _case(far)) if before and far else None

    def _prompt_pair(self, chunks: int) -> tuple[Case, Case] | None:
        if chunks < 2:
            return None
        runs = [self._drain([chunks * self._chunk], 1) for _ in range(2)]
        return _case([steps[0] for steps in runs]), _case([steps[-1] for steps in runs])

    def _fits(self, rows: int, prompt: int) -> bool:
        backend, each = self._engine.backend, prompt + self._output(rows, prompt)
        return rows * backend.groups.blocks(each, backend.block_size, self._chunk) <= backend.num_blocks and each <= self._room

    def _output(self, rows: int, prompt: int) -> int:
        """Tokens for which the first sequences run on while the prompts of the others are computed, and then all together."""
        return 2 * -(-rows * prompt // self._chunk) + _SKIPPED + self._rounds + 1

    def _decode(self, rows: int, prompt: int) -> list[Step]:
        steps = self._drain([prompt] * rows, self._output(rows, prompt))
        alike = [step for step in steps if step.extent.rows == step.extent.positions == rows]
        return alike[_SKIPPED:][: self._rounds]

    def _drain(self, prompts: list[int], output: int) -> list[Step]:
        engine, recorder = self._engine, self._recorder
        first, size = len(recorder.steps), recorder.spec.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for length in prompts:
            engine.add(Request(next(self._names), [int(self._tokens() * size) for _ in range(length)], params, seed=0))
        while engine.has_work:
            start, before = perf_counter(), len(recorder.steps)
            engine.step()
            took = perf_counter() - start
            self._host.append(max(0.0, took - sum(step.seconds for step in recorder.steps[before:])))
            self._progress.update()
        return recorder.steps[first:]


def _case(steps: list[Step]) -> Case:
    """The mean, without what took more than twice the median: a load of many steps takes their mean."""
    middle = median(step.seconds for step in steps)
    usual = [step for step in steps if step.seconds <= 2 * middle]
    extent = usual[len(usual) // 2].extent
    seconds = fmean(step.seconds for step in usual)
    return Case(usual[0].sequences, extent.positions, extent.keys // usual[0].sequences, seconds, usual[len(usual) // 2].cost, len(steps))


def _speed(pair: tuple[Case, Case] | None, amount: Callable[[StepCost], int]) -> float | None:
    """What attention did a second, by what two cases differ in; None where that is too little of a step to be told from it."""
    if pair is None:
        return None
    near, far = pair
    more, longer = amount(far.cost) - amount(near.cost), far.seconds - near.seconds
    return more / longer if longer > _SEEN * far.seconds and more > 0 else None


def _curve(machine: Machine, cases: list[Case]) -> tuple[tuple[float, float], ...]:
    """Share of their limit that the linears of each case reach; in between of two with as many operations for a byte, the mean."""
    points: dict[float, list[float]] = {}
    for case in cases:
        linears = max(0.05 * case.seconds, case.seconds - machine.attention_seconds(case.cost))
        points.setdefault(case.cost.linear_flops / case.cost.weight_bytes, []).append(machine.linear_limit(case.cost) / linears)
    return tuple((at, sum(shares) / len(shares)) for at, shares in sorted(points.items()))


def describe(steps: Steps) -> str:
    """For the terminal."""
    return "\n".join(_lines(steps))


def _lines(steps: Steps) -> Iterator[str]:
    machine = steps.machine
    yield f"{'sequences':>9} {'positions':>9} {'context':>8} {'ms':>9} {'GFLOP/s':>9} {'GB/s':>7} {'of limit':>9} {'fitted ms':>10}"
    for case in steps.cases:
        cost, took = case.cost, case.seconds
        limit, fitted = machine.linear_limit(cost) + machine.attention_seconds(cost), machine.device_seconds(cost)
        yield (
            f"{case.sequences:>9,} {case.positions:>9,} {case.context:>8,} {1e3 * took:>9.2f} {cost.flops / took / 1e9:>9,.0f} "
            f"{cost.bytes_read / took / 1e9:>7.1f} {limit / took:>9.0%} {1e3 * fitted:>10.2f}"
        )
    reads, computes = machine.attention_bytes_per_s / 1e9, machine.attention_flops_per_s / 1e9
    yield (
        f"this machine: {machine.bytes_per_s / 1e9:.1f} GB/s, {machine.flops_per_s / 1e9:,.0f} GFLOP/s ({machine.weights}); attention "
        f"reads {reads:.1f} GB/s in decoding and computes {computes:,.0f} GFLOP/s in prompts"
    )
    yield f"{1e3 * machine.step_s:.2f} ms of a step are the host's; three quarters of all steps are within {machine.spread:.0%} of the fit"
