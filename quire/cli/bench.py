"""quire bench: measure a model, or what it is made of, on this machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from quire.cli import bench_kernels, workloads
from quire.cli.output import check_writable, write
from quire.config import EMBEDDED_MODEL, MODEL_HELP, EngineConfig, add_arguments, read_config_file, resolve
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.workload import TraceRequest


DEFAULT_MAX_LEN = 2048


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("bench", help="measure a model on this machine", description="Measure a model on this machine.",
                                   allow_abbrev=False)  # fmt: skip
    kinds = parser.add_subparsers(title="benchmarks", dest="benchmark", required=True, metavar="BENCHMARK")
    throughput = kinds.add_parser(
        "throughput",
        help="tokens per second with all requests at once",
        description="Run synthetic requests, all at once, and print tokens per second, how full the KV cache is, and which fraction of the "
        "machine's measured limits is reached. Prompts are random tokens; lengths are lognormal, and output lengths are forced. "
        "--seed draws them.",
        allow_abbrev=False,
    )
    throughput.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                            help=MODEL_HELP)  # fmt: skip
    throughput.add_argument("--requests", type=int, default=64, metavar="N", help="number of requests (default: 64)")
    workloads.add_lengths(throughput)
    throughput.add_argument("--json", metavar="FILE", help="write the result to FILE; - writes it to standard output instead of the table")
    throughput.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(throughput, EngineConfig)
    throughput.set_defaults(run=run_throughput)
    bench_kernels.add_parser(kinds)
    _add_steps(kinds)
    _add_memory(kinds)


def _add_steps(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    steps = kinds.add_parser(
        "steps",
        help="how long steps take here: what quire plan and quire simulate are told of a machine",
        description="Time the engine's steps on this machine, decoding and computing prompts at several sizes, and fit the machine that "
        "plan and simulate take with --machine. Half a minute for a small model. Pass the options that you serve with.",
        allow_abbrev=False,
    )
    steps.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL",
                       help=MODEL_HELP)  # fmt: skip
    steps.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each kind in each of three passes (default: 5)")
    steps.add_argument("--json", metavar="FILE", help="write the machine and the times to FILE; - writes them to standard output instead "
                       "of the table")  # fmt: skip
    steps.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(steps, EngineConfig)
    steps.set_defaults(run=run_steps)


def _add_memory(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    memory = kinds.add_parser(
        "memory",
        help="how much of a KV pool holds tokens: paged memory against contiguous",
        description="Run requests through the engine's own scheduler and block manager, all of them from the start, and print how much of "
        "the full KV pool holds tokens, and how many sequences run in it: paged, and with contiguous runs of the longest sequence that is "
        "allowed (max), of the output rounded up to a power of two (pow2), of the true length (oracle). No model runs, unless --execute is "
        "given. The engine does not know how long an output will be. The lists give one run for each combination.",
        allow_abbrev=False,
    )
    add = memory.add_argument
    add("model", nargs="?", metavar="MODEL",
        help=f"with --execute: {MODEL_HELP}")  # fmt: skip
    add("--dist", metavar="NAME",
        help="draw the lengths: sharegpt-paper or alpaca-paper, the datasets of the PagedAttention paper (default: sharegpt-paper); an "
        "output that would not fit into --max-len ends there")  # fmt: skip
    add("--trace", metavar="FILE", help="take the lengths, and which prompts share a prefix, from a .csv or .jsonl file, perhaps .gz")
    add("--requests", type=int, metavar="N", help="number of requests (default: 2000 with --dist, all of a trace)")
    add("--seed", type=int, default=0, metavar="N", help="draws lengths and prompts (default: 0)")
    add("--pool", type=int, default=15_700, metavar="TOKENS",
        help="token positions that the KV pool holds (default: 15700, those of OPT-13B in the paper)")  # fmt: skip
    add("--max-len", type=int, metavar="TOKENS",
        help="longest sequence that the server allows (default: 2048, or what a trace needs if that is more)")  # fmt: skip
    add("--policy", default="paged,max,pow2,oracle", metavar="LIST", help="of paged, max, pow2, oracle (default: all)")
    add("--block-size", default="16", metavar="LIST",
        help="of paged memory: powers of two up to 1024, with --execute those of the device (default: 16)")  # fmt: skip
    add("--allocator", default="buddy", metavar="LIST", help="of contiguous memory: buddy, first-fit (default: buddy)")
    add("--n", type=int, default=1, metavar="N", help="samples of each request (default: 1)")
    add("--beam-width", type=int, metavar="N", help="beams of each request; needs --execute and --policy paged")
    add("--admission", default="watermark,past-future", metavar="LIST",
        help="of paged memory: watermark, no-evict, past-future, auto (default: watermark,past-future)")  # fmt: skip
    add("--max-num-seqs", type=int, metavar="N",
        help="most sequences at once; 1 runs one after the other (default: 4096; 1024 with --execute; 64, as quire serve has it, for a "
        "trace that says which prompts share a prefix, for with all at once the cache would have no memory left)")  # fmt: skip
    add("--max-num-batched-tokens", type=int, metavar="N", help="most token positions in a step (default: no limit, or 512 with --execute)")
    add("--execute", action="store_true", help="run a model on the memory; its outputs are forced to the lengths")
    add("--json", metavar="FILE", help="write the runs to FILE; - writes them to standard output instead of the table")
    add("--plot", metavar="NAME",
        help="write a picture to NAME.png and NAME.svg (default: quire-bench-memory, where matplotlib is installed)")  # fmt: skip
    add("--no-plot", action="store_true", help="write no picture")
    memory.set_defaults(run=run_memory)


def run_throughput(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.bench import throughput

    (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
    if args.requests < 1:
        raise ConfigError(f"--requests must be at least 1, got {args.requests}")
    check_writable(args.json)
    result = throughput.run(config, args.requests, *workloads.lengths(args))
    text = json.dumps(asdict(result), indent=2)
    if args.json == "-":
        print(text)
        return 0
    print(throughput.describe(result))
    if args.json is not None:
        write(args.json, text + "\n")
    return 0


def run_steps(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.bench import steps

    (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
    if not 1 <= args.rounds <= 1000:
        raise ConfigError(f"--rounds must be from 1 to 1000, got {args.rounds}")
    check_writable(args.json)
    found = steps.run(config, args.rounds)
    if args.json != "-":
        print(steps.describe(found))
    write(args.json, json.dumps(asdict(found), indent=2) + "\n")
    return 0


def run_memory(args: argparse.Namespace) -> int:
    import json
    from dataclasses import replace

    from quire.bench import memory, memory_load, memory_plot

    if args.max_len is None:
        args.max_len = DEFAULT_MAX_LEN  # what --dist's outputs are cut to
        args.max_len = max(DEFAULT_MAX_LEN, *(r.prompt_tokens + r.output_tokens for r in _requests(args)))
    load = memory_load.Load(
        _requests(args),
        **{name: getattr(args, name) for name in ("pool", "max_len", "n", "beam_width", "seed", "max_num_seqs")},
        max_num_batched_tokens=args.max_num_batched_tokens,
        model=(args.model or EMBEDDED_MODEL) if args.execute else None,
    )
    if not args.execute and (name := "MODEL" if args.model else "--beam-width" if args.beam_width is not None else None):
        raise ConfigError(f"{name} needs --execute: without it, no model runs")
    layouts = memory_load.layouts(args.policy.split(","), args.allocator.split(","), _block_sizes(args.block_size))
    # Admission is a matter of paged memory: a contiguous run is there, or it is not.
    names = args.admission.split(",")
    todo = [(replace(load, admission=name), layout) for layout in layouts for name in (names if layout.allocator is None else names[:1])]
    for each, layout in todo:
        memory_load.check(each, layout)
    # Before the work: what can't be written should not cost a run.
    plot = None if args.no_plot else args.plot or "quire-bench-memory"
    if plot is not None:
        try:
            memory_plot.require_matplotlib()
        except ConfigError as e:
            if args.plot is not None:
                raise
            print(f"quire: no picture is written: {e.message}", file=sys.stderr)
            plot = None
    if plot is not None:
        for kind in ("png", "svg"):
            check_writable(f"{plot}.{kind}")
    check_writable(args.json)
    runs = [memory.run(each, layout) for each, layout in todo]
    text = json.dumps({"runs": runs}, indent=2) + "\n"
    if args.json == "-":
        print(text, end="")
    else:
        print(memory_plot.describe(runs))
        for note in memory.notes(runs):
            print(note)
        if args.json is not None:
            write(args.json, text)
    if plot is not None:
        paths = memory_plot.plot(runs, plot)
        if args.json != "-":
            print(f"picture: {', '.join(map(str, paths))}")
    return 0


def _requests(args: argparse.Namespace) -> list[TraceRequest]:
    """What ``--trace`` or ``--dist`` says."""
    from quire.bench.memory_load import ended_by

    if args.trace is None and args.dist is None:
        args.dist = "sharegpt-paper"
    requests = workloads.drawn_or_traced(args, 2000, args.seed)
    return requests if args.trace is not None else ended_by(requests, args.max_len)


def _block_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise ConfigError(f"--block-size must be numbers with commas between them, such as 8,16,32, got {text!r:.60}") from None
