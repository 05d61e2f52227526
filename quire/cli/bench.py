"""quire bench: measure a model on this machine."""

from __future__ import annotations

import argparse

from quire.config import EMBEDDED_MODEL, EngineConfig, add_arguments, read_config_file, resolve
from quire.errors import ConfigError


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
                            help=f"folder in Hugging Face format (default: {EMBEDDED_MODEL}, the model that ships with Quire)")  # fmt: skip
    throughput.add_argument("--requests", type=int, default=64, metavar="N", help="number of requests (default: 64)")
    throughput.add_argument("--prompt-mean", type=float, default=128, metavar="TOKENS", help="mean prompt length (default: 128)")
    throughput.add_argument("--output-mean", type=float, default=128, metavar="TOKENS", help="mean output length (default: 128)")
    throughput.add_argument("--sigma", type=float, default=0.8, metavar="S",
                            help="standard deviation of the logarithm of both lengths; 0: all equal (default: 0.8)")  # fmt: skip
    throughput.add_argument("--cap", type=int, default=512, metavar="TOKENS", help="longest prompt, and longest output (default: 512)")
    throughput.add_argument("--json", metavar="FILE", help="write the result to FILE; - writes it to standard output instead of the table")
    throughput.add_argument("--config", metavar="FILE", help="TOML file with options of the engine")
    add_arguments(throughput, EngineConfig)
    throughput.set_defaults(run=run_throughput)


def run_throughput(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from quire.bench import throughput
    from quire.workload import Lengths

    (config,) = resolve((EngineConfig,), vars(args), read_config_file(args.config))
    if args.requests < 1:
        raise ConfigError(f"--requests must be at least 1, got {args.requests}")
    if args.json not in (None, "-"):
        _write(args.json, "")  # before the work: a wrong path should not cost a run
    prompt, output = (Lengths(mean, args.sigma, args.cap) for mean in (args.prompt_mean, args.output_mean))
    result = throughput.run(config, args.requests, prompt, output)
    text = json.dumps(asdict(result), indent=2)
    if args.json == "-":
        print(text)
        return 0
    print(throughput.describe(result))
    if args.json is not None:
        _write(args.json, text + "\n")
    return 0


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w" if text else "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise ConfigError(f"can't write {path}: {e.strerror}") from None
