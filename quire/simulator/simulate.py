"""A server before it is there: the engine's own scheduler and block manager, under requests that come when they come, on a device that
takes as long for a step as a machine is known to take. Nothing of the engine is modelled; only the time of a step is.

What is not counted: tokenizing and HTTP (about a millisecond a request), swapping, and guessed tokens (speculation), which depend on
the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quire.config import EngineConfig
from quire.core.engine import Engine, Executor
from quire.core.groups import ONE_GROUP, KVGroups
from quire.errors import ConfigError
from quire.machine import Machine
from quire.models.spec import ModelCost
from quire.simulator.clock import RealTime, SimulatedTime, Time
from quire.simulator.devices import Forced, ForcedAhead, NoModel, Simulated, SimulatedAhead
from quire.simulator.drive import Clients
from quire.simulator.report import Goodput, Report, report
from quire.workload import TraceRequest, arrive_at, prompt_token_ids

ENOUGH = 0.95
"""Share of the requests that a rate has to serve well."""
CLOSE = 1.05
"""Two rates between which the highest one is not looked for any further."""
LASTING = 40
_KEPT_UP = 0.95
"""Of Report.kept_up: a queue that grows more slowly does not show in that time."""
_ALONE, _MOST = 50, 20_000
"""Requests that are timed alone, and with which a rate is tried at most."""
_APART = 0.01
"""Of them in flight on average: as good as alone."""


@dataclass(slots=True, frozen=True)
class Load:
    """Who asks for what. Raises ConfigError."""

    requests: Sequence[TraceRequest]
    """In the order of their arrival; without a time all come at once."""
    concurrency: int | None = None
    """Most requests in flight; the others wait with their clients."""
    max_tokens: int | None = None
    """What clients ask for at most; None: nothing."""
    seed: int = 0
    """Draws the tokens of prompts."""

    def __post_init__(self) -> None:
        for option, value in (("--concurrency", self.concurrency), ("--max-tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, got {value}")


@dataclass(slots=True, frozen=True)
class Server:
    """An engine, the size of its pool, and what the steps of its model ask of a machine."""

    config: EngineConfig
    num_blocks: int
    max_model_len: int
    cost: ModelCost
    groups: KVGroups = ONE_GROUP
    """Of the model's layers."""


def simulate(server: Server, machine: Machine, load: Load, goodput: Goodput) -> Report:
    """Run ``load`` to its end in simulated time. Raises what an engine raises whose pool is too small."""
    time, lengths, config = SimulatedTime(), dict[int, int](), server.config
    nothing = NoModel(server.num_blocks, config.block_size, server.max_model_len, server.groups)
    ends = nothing.spec.vocab_size - 1
    forced = Forced(nothing, lengths, ends)
    make = Simulated if config.device == "cpu" else SimulatedAhead
    return _run("Simulating", make(forced, machine, server.cost, time), forced, config, time, load, goodput, lengths, ends)


def execute(config: EngineConfig, load: Load, goodput: Goodput) -> Report:
    """Run ``load`` on the model itself, in real time, without a server: what ``simulate`` foretells. Raises what loading it raises."""
    from quire.llm import LLM

    backend, lengths = LLM.from_config(config).backend, dict[int, int]()
    ends = (backend.spec.eos_token_ids or (0,))[0]
    make: Callable[..., Forced] = ForcedAhead if backend.overlaps else Forced
    forced = make(backend, lengths, ends)
    return _run("Running", forced, forced, config, RealTime(), load, goodput, lengths, ends)


def highest_rate(
    run: Callable[[Sequence[TraceRequest]], Report], requests: Sequence[TraceRequest], seed: int, about: float | None = None
) -> tuple[float, Report]:
    """The most requests a second, to 5 %, that are served well for as long as they come, and what that is like.

    Served well: ENOUGH of all, and of the last quarter, and as many end as come. They come for at least LASTING times as long as one of
    them takes alone, the same ones again where there are too few. about: what the answer is thought to be. Raises ConfigError where
    they are not even if each comes alone.
    """
    together = run(arrive_at(requests, float("inf"), seed))
    if not together.completed:
        raise ConfigError("none of these requests is served at all: each is longer than the context; raise --max-model-len")
    alone = run(arrive_at(requests[:_ALONE], 1e-6, seed))
    takes = alone.latencies["e2el"]["mean"] or together.latencies["e2el"]["mean"]

    def tried(rate: float) -> tuple[bool, Report]:
        count = min(max(len(requests), round(LASTING * takes * rate)), max(len(requests), _MOST))
        found = run(arrive_at([requests[i % len(requests)] for i in range(count)], rate, seed))
        return min(found.goodput or 0.0, found.goodput_late or 0.0) >= ENOUGH and (found.kept_up or 0.0) >= _KEPT_UP, found

    low = high = 0.0
    best, factor, rate = together, 2.0 if about is None else 1.2, about or together.requests_per_s
    while not (low and high) or high / low > CLOSE:
        good, found = tried(rate)
        if good:
            low, best = rate, found
        else:
            high = rate
            if rate * takes < _APART:
                raise ConfigError(
                    f"no rate keeps --goodput for {ENOUGH:.0%} of these requests: where hardly two meet, {found.goodput or 0:.1%} of all "
                    f"are served so, and {found.goodput_late or 0:.1%} of the last quarter"
                )
        rate = (low * high) ** 0.5 if low and high else rate * factor if good else rate / factor
    return low, best


def _run(
    title: str,
    device: Executor,
    forced: Forced,
    config: EngineConfig,
    time: Time,
    load: Load,
    goodput: Goodput,
    lengths: dict[int, int],
    ends: int,
) -> Report:
    engine, size = Engine(device, replace(config, speculation="off"), time.now), device.spec.vocab_size

    def prompt(work: TraceRequest, number: int) -> list[int]:
        return prompt_token_ids(work, number, size, load.seed)

    clients = Clients(engine, forced, time, load.requests, prompt, lengths, (ends,), load.concurrency, load.max_tokens)
    return report(clients.drive(title), engine, goodput)
