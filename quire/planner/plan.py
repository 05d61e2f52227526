"""From a model, the options of a server and a machine to what the server will do. The arithmetic of memory is the backend's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import fmean

from quire.backends.memory import KVMemory, Room, context_length, kv_layout, kv_memory, planned_room
from quire.config import EngineConfig
from quire.core.plan import RowWork, StepExtent, StepPlan
from quire.errors import CapacityError, ConfigError
from quire.machine import Machine
from quire.models.parallel import part_of
from quire.models.quantization import Quantization, planned_cost
from quire.models.spec import ModelCost, TransformerSpec

PROMPT, OUTPUT = 512, 256
_PARTS = 64
"""Moments of an output at which a sequence is looked at, for the mean of its blocks."""


@dataclass(slots=True, frozen=True)
class Speed:
    """Steps in which so many sequences decode, with so many tokens each."""

    sequences: int
    context: int
    step_s: float
    each_per_s: float
    all_per_s: float


@dataclass(slots=True, frozen=True)
class Prompt:
    """A prompt that is computed alone, in chunks."""

    tokens: int
    seconds: float


@dataclass(slots=True, frozen=True)
class Demand:
    """What the server is for. Raises ConfigError."""

    prompt: int | None = None
    """Tokens, mean; None: PROMPT, or as much as fits."""
    output: int | None = None
    """The same; None: OUTPUT."""
    sequences: int | None = None
    """People at the same time; None: as many as there is room for."""

    def __post_init__(self) -> None:
        for option, value in (("--prompt", self.prompt), ("--output", self.output), ("--sequences", self.sequences)):
            if value is not None and not 1 <= value <= 10**9:
                raise ConfigError(f"{option} must be from 1 to 1,000,000,000, got {value}")

    def lengths(self, context: int) -> tuple[int, int]:
        """Prompt and output, within a context. Raises ConfigError where what was stated does not fit."""
        stated = (self.prompt or 0) + (self.output or 0)
        if stated + (self.prompt is None) + (self.output is None) > context:
            raise ConfigError(
                f"--prompt {self.prompt or 1:,} + --output {self.output or 1:,} > context of {context:,} tokens: lower them, or raise "
                "--max-model-len if the model allows it"
            )
        prompt = self.prompt or min(PROMPT, context - (self.output or max(1, context // 3)))
        return prompt, self.output or min(OUTPUT, context - prompt)


@dataclass(slots=True, frozen=True)
class Plan:
    """``asdict`` of it is what ``--json`` writes. Bytes and seconds; of one device where several share the model."""

    parameters: int
    prompt: int
    """Tokens that are reckoned with; the demand's, where they fit."""
    output: int
    max_model_len: int
    weights: int
    buffers: int
    available: int
    kv_per_token: int
    block_size: int
    pool: int
    """Bytes of the KV pool; 0 where nothing fits."""
    num_blocks: int
    pool_tokens: int
    """The longest sequence that the pool holds, or as many shorter ones as fill it if no layer has a window."""
    layers: int
    """Whose keys and values a block holds: those of one group, where some layers have a window and others see everything."""
    note: str
    """How the pool was sized, where its size was not stated."""
    misfit: str | None
    """Why the server would not start; None: it would. What else is here is then for a ``max_model_len`` that fits; there are no blocks
    where none does."""
    max_num_seqs: int
    full_length: int
    """Sequences of ``max_model_len`` tokens that the pool holds."""
    blocks_each: float
    """Blocks of a sequence of the demand, mean over its life; where layers have a window, without what its prompt takes while it is
    computed."""
    typical: int
    """Sequences of the demand that run at the same time: what the pool holds, and max_num_seqs allows."""
    speeds: list[Speed]
    prompts: list[Prompt]
    requests_per_s: float
    """Of the demand, with ``typical`` of them at the same time."""
    first_token_s: float
    """Of such a request's prompt beside the others, if it need not wait."""
    needed: int | None
    """Bytes of KV pool for all sequences of the demand at their full lengths; None where it says no number."""


def plan(config: EngineConfig, whole: TransformerSpec, machine: Machine, demand: Demand) -> Plan:
    """Raises ConfigError for options that contradict each other or the model."""
    if (quantization := Quantization.of(config, whole)) is not None:
        quantization.check(whole)
    spec, size = part_of(whole, config.tensor_parallel), config.block_size
    asked, room = context_length(config, spec), planned_room(config, whole, machine.memory)
    prompt, output = demand.lengths(asked)
    per_token = spec.kv_bytes_per_token(config.kv_width(spec.dtype))
    blocks, note, length, misfit = _pool(config, spec, asked, room)
    if length < prompt + output:
        prompt, output = Demand().lengths(max(2, length))
    layout = kv_layout(spec, length, size)
    block = layout.block_bytes(config, spec)
    cost, rows = planned_cost(config, whole), config.num_seqs(blocks or 1 << 30, layout.groups.width)

    def held(tokens: float) -> int:
        """Blocks of a sequence."""
        return layout.groups.blocks(ceil(tokens), size)

    each = fmean(held(prompt + output * (i + 0.5) / _PARTS) for i in range(_PARTS))
    typical = min(rows, int(blocks / each))
    wanted = typical if demand.sequences is None else min(demand.sequences, typical)
    context = prompt + output // 2
    needed = None
    if demand.sequences is not None:  # of a window, a prompt that is computed holds more than one that is done
        computing = layout.groups.blocks(prompt + output, size, config.max_num_batched_tokens)
        needed = ((demand.sequences - 1) * held(prompt + output) + computing) * block
    window = layout.groups.window
    alone = _prompt_seconds(config, cost, machine, prompt, window)
    busy = machine.seconds(cost.of(decoding(max(1, wanted), context, window)))
    return Plan(
        parameters=whole.num_parameters(),
        prompt=prompt,
        output=output,
        max_model_len=length,
        weights=room.weights,
        buffers=room.buffers,
        available=room.available or 0,
        kv_per_token=per_token,
        block_size=size,
        pool=blocks * block,
        num_blocks=blocks,
        pool_tokens=layout.groups.positions(blocks, size),
        layers=layout.slots,
        note=note,
        misfit=misfit,
        max_num_seqs=rows,
        full_length=min(rows, blocks // held(length)),
        blocks_each=each,
        typical=typical,
        speeds=[_speed(cost, machine, n, context, window) for n in _ladder(typical or 1, demand.sequences)],
        prompts=[Prompt(n, _prompt_seconds(config, cost, machine, n, window)) for n in _prompts(prompt, length)],
        # A request takes its prompt, and of each of its steps its part.
        requests_per_s=wanted / (output * busy + wanted * alone) if wanted else 0.0,
        first_token_s=alone + -(-prompt // config.max_num_batched_tokens) * (busy if wanted > 1 else 0.0),
        needed=needed,
    )


def _pool(config: EngineConfig, spec: TransformerSpec, asked: int, room: Room) -> tuple[int, str, int, str | None]:
    """Blocks, the arithmetic, the longest sequence, and why that is not as long as was asked for. No blocks where nothing fits."""
    try:
        memory = kv_memory(config, spec, asked, room)
    except CapacityError as e:
        misfit = e.message
    else:
        return memory.num_blocks, memory.note, asked, None
    found, (fits, fails) = KVMemory(0, 0), (0, asked)
    while fails - fits > 1:  # by bisection: what the pool is depends on what it is to hold
        length = (fits + fails) // 2
        try:
            found, fits = kv_memory(config, spec, length, room), length
        except CapacityError:
            fails = length
    return found.num_blocks, found.note, max(1, fits), misfit


def alternatives(config: EngineConfig, spec: TransformerSpec, machines: Mapping[str, Machine], demand: Demand) -> list[tuple[str, Plan]]:
    """(widths, plan) for every width of weights and KV that the device has and the model allows. machines: how to quantize, or nothing →
    the machine, which may compute in another width then."""
    found = []
    for quantize in machines:
        for kv in ("float16", "int8") if config.device_kind == "cpu" else ("auto", "fp8"):
            try:
                each = replace(config, quantize=quantize or None, group_size=None, cache_dir=None, kv_dtype=kv)
                made = plan(each, spec, machines[quantize], demand)
            except ConfigError:  # a group size that does not divide the model's widths, a width that the device does not have
                continue
            found.append((f"{quantize or config.weight_width(spec.dtype)}, KV {each.kv_width(spec.dtype)}", made))
    return found


def decoding(rows: int, context: int, window: int = 0) -> StepExtent:
    """A step of so many sequences, a token each, the last of so many. window: of the layers that have one."""
    return StepPlan(work=[RowWork(row, context - 1, 1, [], True) for row in range(rows)]).extent(window)


def _prompt_seconds(config: EngineConfig, cost: ModelCost, machine: Machine, tokens: int, window: int) -> float:
    """Of a prompt's steps, if it is alone."""
    step = config.max_num_batched_tokens
    chunks = [RowWork(0, start, min(step, tokens - start), [], start + step >= tokens) for start in range(0, tokens, step)]
    return sum(machine.seconds(cost.of(StepPlan(work=[chunk]).extent(window))) for chunk in chunks)


def _speed(cost: ModelCost, machine: Machine, rows: int, context: int, window: int) -> Speed:
    step_s = machine.seconds(cost.of(decoding(rows, context, window)))
    return Speed(rows, context, step_s, 1 / step_s, rows / step_s)


def _ladder(most: int, asked: int | None) -> Sequence[int]:
    """1, 4, 16 and so on up to ``most``, it and what was asked for included."""
    return sorted({n for n in (1, 4, 16, 64, 256, 1024, 4096, most, asked or 1) if n <= most})


def _prompts(asked: int, most: int) -> Sequence[int]:
    return sorted({n for n in (128, 512, 2048, 8192, 32768, asked) if n < most})
