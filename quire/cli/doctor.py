"""quire doctor: what this machine can do, measured, and what keeps it from doing more."""

from __future__ import annotations

import argparse

from quire.cli.output import check_writable, write


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="measure what this machine can do",
        description="Print what this machine is and what Quire uses of it, and measure its limits: memory read bandwidth, arithmetic peaks "
        "for each instruction set, the cost of a parallel region. Takes a few seconds; run it while the machine is idle. QUIRE_ISA in the "
        "environment chooses the instruction set.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="most threads to measure with (default: the cores that this process may use)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE; - writes it to standard output instead of the text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.backends.base import cpu_kernels
    from quire.config import EngineConfig

    EngineConfig(threads=args.threads)  # checks the range
    with cpu_kernels():
        from quire.backends.cpu import doctor
    check_writable(args.json)
    report = doctor.measure(args.threads)
    if args.json != "-":
        print(doctor.describe(report))
    write(args.json, json.dumps(asdict(report), indent=2) + "\n")
    return 0
