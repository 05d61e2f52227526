"""Options that say which requests there are: drawn lengths, or a trace."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.workload import Lengths, TraceRequest


def add_lengths(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Of drawn requests."""
    add = parser.add_argument
    add("--prompt-mean", type=float, default=128, metavar="TOKENS", help="mean prompt length (default: 128)")
    add("--output-mean", type=float, default=128, metavar="TOKENS", help="mean output length (default: 128)")
    add("--sigma", type=float, default=0.8, metavar="S",
        help="standard deviation of the logarithm of both lengths; 0: all equal (default: 0.8)")  # fmt: skip
    add("--cap", type=int, default=512, metavar="TOKENS", help="longest prompt, and longest output (default: 512)")


def lengths(args: argparse.Namespace) -> tuple[Lengths, Lengths]:
    """Of prompts and outputs. Raises ConfigError."""
    from quire.workload import Lengths

    return Lengths(args.prompt_mean, args.sigma, args.cap), Lengths(args.output_mean, args.sigma, args.cap)


def drawn_or_traced(args: argparse.Namespace, count: int, seed: int, *, by_time: bool = False) -> list[TraceRequest]:
    """What ``--trace`` says, or ``--dist``, or the lengths; ``--requests`` of them, by default all of a trace, else ``count``.

    by_time: the first of a trace are those that come first, and not those of the file. Raises ConfigError.
    """
    from quire.workload import draw_requests, paper_lengths, read_trace

    if args.requests is not None and args.requests < 1:
        raise ConfigError(f"--requests must be at least 1, got {args.requests}")
    if args.trace is None:
        prompt, output = lengths(args) if args.dist is None else paper_lengths(args.dist)
        return draw_requests(args.requests or count, prompt, output, seed)
    if args.dist is not None:
        raise ConfigError("--trace and --dist both say which requests to run: pass one of them")
    requests = read_trace(args.trace)
    if args.requests is not None and args.requests > len(requests):
        raise ConfigError(f"--requests {args.requests:,}, but the trace {args.trace} has only {len(requests):,}: lower it, or leave it out")
    if by_time:
        requests = sorted(requests, key=lambda request: request.arrival_s or 0.0)
    return requests[: args.requests]
