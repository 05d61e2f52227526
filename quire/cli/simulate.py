"""quire simulate: what a server will do under a load, from the engine's own scheduler in simulated time."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quire.cli import machines, workloads
from quire.cli.output import check_writable, write
from quire.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.simulator.report import Report
    from quire.workload import TraceRequest

REQUESTS = 500
"""Where no trace says how many there are."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="what a server will do under a load, before it is there",
        description="Run requests, as they come, through the engine's own scheduler and block manager, on a device that takes as long for "
        "a step as --machine is known to take: latencies, tokens per second, memory, preemptions. The weights are not needed, config.json "
        "is. The engine does not know how long an output will be.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    come = parser.add_argument_group("when requests come (default: all at once)")
    come.add_argument("--rate", type=float, metavar="R", help="so many a second on average, independent of each other (Poisson)")
    come.add_argument("--concurrency", type=int, metavar="N", help="at most N at a time: the next one comes when one has ended")
    come.add_argument(
        "--speedup", type=float, metavar="X", help="when the trace says, X times as fast (default with a trace that has times: 1)"
    )
    come.add_argument("--find-rate", action="store_true", help="look for the highest --rate at which 95 %% of the requests keep --goodput")
    what = parser.add_argument_group("which requests")
    what.add_argument("--requests", type=int, metavar="N", help=f"number of requests (default: {REQUESTS}, or all of a trace)")
    workloads.add_lengths(what)
    what.add_argument("--dist", metavar="NAME",
                      help="draw the lengths from sharegpt-paper or alpaca-paper, the datasets of the PagedAttention paper")  # fmt: skip
    what.add_argument("--trace", metavar="FILE",
                      help="take lengths, times, and which prompts share a prefix, from a .csv or .jsonl file, perhaps .gz")  # fmt: skip
    what.add_argument("--max-tokens", type=int, metavar="N", help="what clients ask for at most (default: nothing)")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="a request is served well within these milliseconds, as in vLLM's benchmark: ttft:500 tpot:50 e2el:20000")  # fmt: skip
    add("--check", action="store_true", help="run the same on the model itself, in real time, and print both: needs the weights")
    machines.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.backends.memory import context_length, kv_layout, kv_memory, planned_room
    from quire.models.parallel import part_of
    from quire.models.quantization import planned_cost
    from quire.models.weights import load_spec, resolve_model
    from quire.simulator import report, simulate

    stated = machines.stated(args)
    config = machines.configured(args, stated)
    goodput = report.Goodput.parse(args.goodput)
    requests = _arriving(args, config.seed, bool(goodput.limits))
    check_writable(args.json)
    whole = load_spec(resolve_model(config.model, weights=args.check))
    config = config.as_stored(whole.quantized)
    machine = machines.open_machine(stated, config, whole, args.memory)
    spec = part_of(whole, config.tensor_parallel)
    length = context_length(config, spec)
    num_blocks = kv_memory(config, spec, length, planned_room(config, whole, machine.memory)).num_blocks
    groups = kv_layout(spec, length, config.block_size).groups
    server = simulate.Server(config, num_blocks, length, planned_cost(config, whole), groups)

    def load(requests: Sequence[TraceRequest]) -> simulate.Load:
        return simulate.Load(requests, args.concurrency, args.max_tokens, config.seed)

    def on(factor: float, about: float | None = None) -> tuple[float | None, Report]:
        def run(requests: Sequence[TraceRequest]) -> Report:
            return simulate.simulate(server, machine.slower(factor), load(requests), goodput)

        return simulate.highest_rate(run, requests, config.seed, about) if args.find_rate else (None, run(requests))

    rate, result = on(1.0)
    others: dict[str, tuple[float | None, Report]] = {}
    if machine.spread:
        slow = 1 + machine.spread
        others = {
            f"{1 - 1 / slow:.0%} less": on(1 / slow, rate and rate * slow),
            f"{machine.spread:.0%} more": on(slow, rate and rate / slow),
        }
    measured = simulate.execute(config, load(requests), goodput) if args.check else None
    if args.json != "-":
        print(f"machine      {machine.name}: {machine.source}; times of steps to about {machine.spread:.0%}")
        most = config.num_seqs(num_blocks, groups.width)
        print(f"server       KV pool of {num_blocks:,} blocks of {config.block_size}, {most:,} sequences at most")
        if config.swap_bytes:
            print("             --swap-memory is not simulated: who has to make room is computed again")
        if rate is not None:
            print(f"rate         {rate:.3g} requests a second at most; {result.requests:,} of them at that rate:")
        print(report.describe(result, goodput))
        for name, (other, found) in others.items():
            print(f"if steps take {name}: " + ("" if other is None else f"{other:.3g} requests a second; ") + report.in_short(found))
        if measured is not None:
            print(report.compare(result, measured))
    made = {
        "machine": asdict(machine),
        "rate": rate,
        "simulated": asdict(result),
        "steps take": {name: {"rate": other, **asdict(found)} for name, (other, found) in others.items()},
        "measured": None if measured is None else asdict(measured),
    }
    write(args.json, json.dumps(made, indent=2) + "\n")
    return 0


def _arriving(args: argparse.Namespace, seed: int, good: bool) -> list[TraceRequest]:
    """The requests, with their times."""
    from quire.workload import arrive_at, sped_up

    given = [f"--{name}" for name in ("rate", "concurrency", "speedup", "find_rate") if getattr(args, name)]
    given = [name.replace("_", "-") for name in given]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both say when requests come: pass one of them")
    if args.find_rate and not good:
        raise ConfigError("--find-rate needs to know what is good enough: add for example --goodput ttft:1000 tpot:100")
    if args.find_rate and args.check:
        raise ConfigError("--check runs one load in real time: pass the --rate that was found with it, and leave --find-rate out")
    if args.speedup is not None and args.trace is None:
        raise ConfigError("--speedup is for a --trace: pass one, or --rate")
    requests = workloads.drawn_or_traced(args, REQUESTS, seed, by_time=True)
    if args.rate is not None:
        return arrive_at(requests, args.rate, seed)
    timed = args.trace is not None and (args.speedup is not None or all(request.arrival_s is not None for request in requests))
    if timed and args.concurrency is None and not args.find_rate:
        return sped_up(requests, 1.0 if args.speedup is None else args.speedup)
    return arrive_at(requests, float("inf"), seed)
