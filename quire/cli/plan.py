"""quire plan: whether a model fits, for how many people, and how fast; before anything is downloaded or bought."""

from __future__ import annotations

import argparse
import math

from quire.cli import machines
from quire.cli.output import check_writable, write
from quire.errors import ConfigError
from quire.machine import GPUS


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="whether a model fits, for how many people, and how fast",
        description="Whether a model fits, for how many people, and how fast, with the arithmetic: on this machine, on a GPU that is "
        "known, or on one that quire bench steps has measured. The weights are not needed, config.json is. Pass the options that you would "
        "serve with.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", type=int, metavar="TOKENS", help="mean length of prompts (default: 512, or what fits)")
    add("--output", type=int, metavar="TOKENS", help="mean length of outputs (default: 256, or what fits)")
    add("--sequences", type=int, metavar="N", help="people at the same time (default: as many as there is room for)")
    add("--price", type=float, metavar="AMOUNT", help="of an hour of the machine: what a million tokens cost")
    machines.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where the model does not fit."""
    import json
    from dataclasses import asdict

    from quire.models.parallel import part_of
    from quire.models.weights import load_spec, resolve_model
    from quire.planner import describe, plan

    stated = machines.stated(args)
    config = machines.configured(args, stated)
    demand = plan.Demand(args.prompt, args.output, args.sequences)
    if args.price is not None and not (args.price >= 0 and math.isfinite(args.price)):
        raise ConfigError(f"--price must be at least 0, got {args.price:g}")
    check_writable(args.json)
    spec = load_spec(resolve_model(config.model, weights=False))
    config = config.as_stored(spec.quantized)
    machine = machines.open_machine(stated, config, spec, args.memory)
    found = plan.plan(config, spec, machine, demand)
    others = plan.alternatives(config, spec, machines.by_width(config, spec, stated, machine), demand)
    gpus = []
    if stated in GPUS.values():
        gpus = [(name, plan.plan(config, spec, machines.open_machine(gpu, config, spec, None), demand)) for name, gpu in GPUS.items()]
    if args.json != "-":
        print(describe.describe(found, config, part_of(spec, config.tensor_parallel), machine, demand, args.price))
        columns = f"sequences: of {found.prompt:,} + {found.output:,} tokens at a time; 1 alone, all: output tokens/s"
        print(f"\n{describe.table(others, 'other widths')}")
        if gpus:
            print(f"\n{describe.table(gpus, 'other GPUs')}")
        print(columns)
    made = {"machine": asdict(machine), "plan": asdict(found), **{key: {name: asdict(p) for name, p in named} for key, named in
            (("widths", others), ("gpus", gpus))}}  # fmt: skip
    write(args.json, json.dumps(made, indent=2) + "\n")
    return 0 if found.misfit is None else 1
