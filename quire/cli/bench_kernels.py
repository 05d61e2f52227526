"""quire bench kernels: every kernel over the shapes that matter, as a share of what the machine can do."""

from __future__ import annotations

import argparse

from quire.cli.output import check_writable, write


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = kinds.add_parser(
        "kernels",
        help="every kernel over the shapes that matter, beside the limits of the machine",
        description="Time the kernels of the CPU backend over the shapes of four models, and print bytes and operations per second and the "
        "fraction of the limit that binds (memory, a cache, or arithmetic; see quire doctor). No model is needed: weights are random. "
        "Everything takes about two minutes; lists choose a part. QUIRE_ISA in the environment chooses the instruction set.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="LIST", help="of llama-160m, llama-0.5b, Llama-3.2-1B, Qwen3-0.6B (default: all)")
    add(
        "--dtype",
        metavar="LIST",
        help="of weights and KV: float32, float16, bfloat16, int8, int4, int4+offsets, mxfp4 (default: all that there are)",
    )
    add("--kernel", metavar="LIST", help="of linear, attention, norm, rotary, write_kv, sampling (default: all)")
    add("--rows", metavar="LIST", help="rows of a step; sequences in decode attention; prefill runs where 512 or 2048 is one of them "
        "(default: what is usual for each kernel, 1 to 512)")  # fmt: skip
    add("--group-size", type=int, metavar="N", help="of int8 and int4 weights: 32, 64, 128, and 0 with --dtype int8 (default: 128)")
    add("--rounds", type=int, default=5, metavar="N", help="rounds of each case, of which the fastest counts (default: 5)")
    add("--threads", type=int, metavar="N", help="threads that compute (default: the cores that this process may use)")
    add("--json", metavar="FILE", help="write all figures to FILE; - writes them to standard output instead of the table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.backends.base import cpu_kernels
    from quire.config import EngineConfig
    from quire.errors import ConfigError

    EngineConfig(threads=args.threads)  # checks the range
    if not 1 <= args.rounds <= 1000:
        raise ConfigError(f"--rounds must be from 1 to 1000, got {args.rounds}")
    with cpu_kernels():
        from quire.backends.cpu import kernel_bench as bench
    selection = bench.select(args.model, args.dtype, args.kernel, args.rows, args.group_size)
    check_writable(args.json)
    if args.json == "-":
        done = bench.run(selection, args.rounds, args.threads)
    else:
        done = bench.run(
            selection,
            args.rounds,
            args.threads,
            lambda limits: print(f"{bench.describe_limits(limits)}\n\n{bench.HEADER}", flush=True),
            lambda result: print(bench.describe(result), flush=True),
        )
        print(f"\n{bench.summarize(done)}")
    write(args.json, json.dumps(asdict(done), indent=2) + "\n")
    return 0
