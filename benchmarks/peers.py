"""Quire against other engines on one machine: the same weights, the same requests, the same threads.

    python tools/make_model.py --shape llama-160m --out llama-160m
    python benchmarks/peers.py llama-160m --vllm-python PYTHON --transformers-python PYTHON --llama-server PROGRAM --out DIR

Three kinds of runs: the throughput of many requests at once (the default), ``--decode`` of one request, ``--prefill`` of one prompt.
Output lengths are forced and checked; prompts are random tokens, new ones in each round, sent as token ids; sampling is greedy. An
engine that has a server is measured through it. All are started once, stopped (SIGSTOP) while others run, and take turns: medians,
with the slowest and the fastest round. Engines that are not installed are named and left out; none of them is a dependency.
docs/benchmarks/peers.md says how they get installed and configured.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peer_engines.engines import NAMES, Setup, installed, make
from peer_engines.measure import Decode, Mode, Prefill, Throughput, measure
from peer_engines.process import MissingPeer, Peer
from peer_engines.report import markdown, result, write
from peer_engines.workload import draw
from quire.errors import QuireError
from quire.models.weights import load_spec, resolve_model
from quire.workload import Lengths


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False, epilog=f"Engines: {', '.join(NAMES)}")
    parser.add_argument("model", metavar="MODEL", help="model folder in Hugging Face format, or a GGUF file, for quire-file and llama-file")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for table, plot, JSON, logs and GGUF files")
    parser.add_argument(
        "--engines",
        metavar="A,B,...",
        help="which, in the order of the first round (default: all that are here, in float32 or with the GGUF file)",
    )
    parser.add_argument("--define", action="append", default=[], metavar="'NAME=ENGINE OPTIONS'",
                        help="one more engine: a known one with more options, e.g. 'quire-kv8=quire --kv-dtype int8'")  # fmt: skip
    parser.add_argument("--quire-options", default="", metavar="'OPTIONS'", help="added to quire serve, for all of its engines")
    parser.add_argument("--vllm-python", default=sys.executable, metavar="PYTHON", help="a Python that has vLLM for CPU")
    parser.add_argument("--transformers-python", default=sys.executable, metavar="PYTHON", help="a Python that has transformers and torch")
    parser.add_argument("--llama-server", default="llama-server", metavar="PROGRAM", help="default: the one on the PATH")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--decode", action="store_true", help="one request at a time: tokens/s after the first token")
    kind.add_argument("--prefill", action="store_true", help="one prompt at a time: its tokens/s")
    parser.add_argument("--requests", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-mean", type=float, default=128, metavar="TOKENS", help="with --decode: the prompt's length")
    parser.add_argument("--output-mean", type=float, default=128, metavar="TOKENS", help="with --decode: the output's length")
    parser.add_argument("--cap", type=int, default=512, metavar="TOKENS", help="longest prompt, and longest output (default: 512)")
    parser.add_argument("--prefill-prompts", type=int, nargs="+", default=[512, 2048], metavar="TOKENS")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the lengths")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="for every engine (default: all cores)"
    )
    parser.add_argument("--restart", action="store_true",
                        help="start each engine for its turn only: where all of them together don't fit the memory")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the engines are stopped, and not left behind
        signal.signal(number, _end)
    try:
        made = compare(args)
    except QuireError as e:
        print(f"peers: {e.message}", file=sys.stderr)
        return e.exit_code
    print(markdown(made))
    print("written:", *write(made, args.out))
    return 0 if made["engines"] else 1


def _end(number: int, _: Any) -> None:
    """Unwind, which stops all engines; a second signal must not interrupt that (``timeout`` sends two)."""
    for further in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(further, signal.SIG_IGN)
    sys.exit(128 + number)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run it all. Raises QuireError for a model or lengths that can't be."""
    model = resolve_model(args.model).resolve()
    spec = load_spec(model)
    kind, mode, what = _mode(args)
    setup = Setup(
        model=model, out=args.out, threads=args.threads, longest=max(sum(pair) for pair in mode.lengths), concurrent=kind == "throughput",
        vllm_python=args.vllm_python, transformers_python=args.transformers_python, llama_server=args.llama_server,
        quire_options=tuple(shlex.split(args.quire_options)), defined=dict(map(_definition, args.define)),
    )  # fmt: skip
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name in args.engines.split(",") if args.engines else [*installed(setup), *setup.defined]:
        try:
            peers.append(make(name, setup))
        except MissingPeer as e:
            missing[name] = str(e)
            print(f"peers: without {name}: {e}", file=sys.stderr)
    records = measure(peers, mode, args.rounds, spec.vocab_size, restart=args.restart)
    return result(records, missing, {
        "kind": kind, "model": model.name, "what": what, "date": date.today().isoformat(), "rounds": args.rounds, "lengths": mode.lengths,
        "machine": {"cpu": _cpu_name(), "threads": args.threads, "system": platform.platform(), "python": platform.python_version()},
    })  # fmt: skip


def _mode(args: argparse.Namespace) -> tuple[str, Mode, str]:
    """Its short name, the mode, and what it is in words."""
    if args.decode:
        prompt, output = int(args.prompt_mean), max(2, int(args.output_mean))
        return "decode", Decode(prompt, output), f"decode of one request, prompt of {prompt} tokens, {output} of output"
    if args.prefill:
        return "prefill", Prefill(tuple(args.prefill_prompts)), "prefill of one prompt"
    lengths = draw(args.requests, Lengths(args.prompt_mean, cap=args.cap), Lengths(args.output_mean, cap=args.cap), args.seed)
    prompts, outputs = map(sum, zip(*lengths, strict=True))
    words = f"{args.requests} requests at once, {prompts:,} prompt + {outputs:,} output tokens (lognormal, mean {args.prompt_mean:g} and {args.output_mean:g}, cap {args.cap}, seed {args.seed})"  # noqa: E501
    return "throughput", Throughput(lengths), words


def _definition(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, rest = text.partition("=")
    words = tuple(shlex.split(rest))
    if not equals or not name.strip() or not words:
        raise SystemExit(f"peers: --define {text!r} must be NAME=ENGINE followed by options, such as 'quire-kv8=quire --kv-dtype int8'")
    return name.strip(), words


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
