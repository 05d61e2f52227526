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
_CLOSE = 1.02
"""Two rates between which the highest one is not looked for any further."""


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


def simulate(server: Server, machine: Machine, load: Load, goodput: Goodput) -> Report:
    """Run ``load`` to its end in simulated time. Raises what an engine raises whose pool is too small."""
    time, lengths, config = SimulatedTime(), dict[int, int](), server.config
    nothing = NoModel(server.num_blocks, config.block_size, server.max_model_len)
    ends = nothing.spec.vocab_size - 1
    make = Simulated if config.device == "cpu" else SimulatedAhead
    device = make(Forced(nothing, lengths, ends), machine, server.cost, time)
    return _run("Simulating", device, config, time, load, goodput, lengths, ends)


def execute(config: EngineConfig, load: Load, goodput: Goodput) -> Report:
    """Run ``load`` on the model itself, in real time, without a server: what ``simulate`` foretells. Raises what loading it raises."""
    from quire.llm import LLM

    backend, lengths = LLM.from_config(config).backend, dict[int, int]()
    ends = (backend.spec.eos_token_ids or (0,))[0]
    make: Callable[..., Forced] = ForcedAhead if backend.overlaps else Forced
    return _run("Running", make(backend, lengths, ends), config, RealTime(), load, goodput, lengths, ends)


def highest_rate(run: Callable[[Sequence[TraceRequest]], Report], requests: Sequence[TraceRequest], seed: int) -> tuple[float, Report]:
    """The most requests a second, to 2 %, of which ENOUGH are served well, and what that is like; ``inf`` where they may all come at once.
    Raises ConfigError where not even single requests are served well."""
    together = run(arrive_at(requests, float("inf"), seed))
    if (together.goodput or 0.0) >= ENOUGH:
        return float("inf"), together
    alone = run(arrive_at(requests, 1e-6, seed))
    if (alone.goodput or 0.0) < ENOUGH:
        raise ConfigError(
            f"no rate keeps --goodput for {ENOUGH:.0%} of these requests: where each comes alone, {alone.goodput or 0:.1%} are served so"
        )
    low, high, best = 0.0, 0.0, alone
    rate = 1 / max(1e-9, alone.latencies["e2el"]["mean"])
    while not high or high / low > _CLOSE:
        found = run(arrive_at(requests, rate, seed))
        if (found.goodput or 0.0) >= ENOUGH:
            low, best = rate, found
        else:
            high = rate
        rate = low * 2 if not high else high / 2 if not low else (low * high) ** 0.5
    return low, best


def _run(
    title: str, device: Executor, config: EngineConfig, time: Time, load: Load, goodput: Goodput, lengths: dict[int, int], ends: int
) -> Report:
    engine, size = Engine(device, replace(config, speculation="off"), time.now), device.spec.vocab_size

    def prompt(work: TraceRequest, number: int) -> list[int]:
        return prompt_token_ids(work, number, size, load.seed)

    clients = Clients(engine, time, load.requests, prompt, lengths, (ends,), load.concurrency, load.max_tokens)
    return report(clients.drive(title), engine, goodput)
