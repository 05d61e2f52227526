"""Quire against transformers' ``generate`` on one machine: the same model, the same requests, the same threads.

    python tools/make_model.py --shape llama-160m --dtype float32 --out llama-160m
    python benchmarks/against_transformers.py llama-160m --transformers-python VENV/bin/python --json result.json

VENV has transformers and torch; Quire needs neither. transformers runs in two ways:

* one at a time: each request by itself (the first 16 only; a rate does not need more),
* static batches of 8, 16 and 32 requests, padded on the left; each batch runs to its longest output. Requests are sorted by
  output length first, which no server can do: it favours transformers. ``--order given`` leaves them as they come.

Quire gets all requests at once, through ``LLM.generate``, and makes text of the tokens too. Output lengths are forced; only
the tokens that a request asked for count. Everything is loaded once and warmed up, then measured in rounds in which the
engines alternate, every other round in reverse order. Medians, with the slowest and fastest round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import IO, Any

Workload = list[tuple[list[int], int]]
"""(prompt tokens, output length) of each request."""


@dataclass(slots=True)
class Run:
    """One measured run."""

    elapsed_s: float
    prompt_tokens: int
    output_tokens: int
    token_ids: list[list[int]]
    """Outputs, in the order of the requests; empty for static batches."""

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.elapsed_s


# The transformers side: runs in another Python, and imports nothing of Quire.


def transformers_side() -> None:
    """Read one JSON object a line, answer each with one line: first what to load, then what to run."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with the answers

    import torch
    import transformers

    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, setup["dtype"]))
    model.eval()
    model.generation_config.eos_token_id = None  # lengths are forced
    workload: Workload = [(prompt, length) for prompt, length in setup["workload"]]

    def generate(requests: Workload) -> list[list[int]]:
        width, length = max(len(prompt) for prompt, _ in requests), max(n for _, n in requests)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in requests])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False, pad_token_id=0)
        assert out.shape[1] == width + length, f"{out.shape[1] - width} tokens instead of {length}"
        return [row[width : width + n].tolist() for row, (_, n) in zip(out, requests, strict=True)]

    def run(command: dict[str, Any]) -> dict[str, Any]:
        requests = workload[: command["count"]]
        if command["order"] == "sorted":
            requests = sorted(requests, key=lambda r: r[1])
        size = command["size"]
        start = perf_counter()
        outputs = [tokens for at in range(0, len(requests), size) for tokens in generate(requests[at : at + size])]
        elapsed = perf_counter() - start
        prompts = sum(len(prompt) for prompt, _ in requests)
        return asdict(Run(elapsed, prompts, sum(map(len, outputs)), outputs if size == 1 else []))

    generate([([1, 2, 3, 4], 4)] * 2)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "attention": model.config._attn_implementation}
    answer: dict[str, Any] = versions
    while True:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        line = sys.stdin.readline()
        if not line:
            return
        answer = run(json.loads(line))


class Transformers:
    """The other process."""

    def __init__(self, python: str, setup: dict[str, Any]) -> None:
        # Both engines get the same threads; the environment must not give torch others.
        environ = {**os.environ, "OMP_NUM_THREADS": str(setup["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        command = [python, __file__, "--transformers-side"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        self.versions = self._ask(setup)

    def run(self, size: int, order: str, count: int) -> Run:
        return Run(**self._ask({"size": size, "order": order, "count": count}))

    def close(self) -> None:
        self._stdin.close()
        self._process.wait()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdout is not None
        self._stdin.write(json.dumps(message) + "\n")
        self._stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the transformers side ended with code {self._process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# The Quire side, and the comparison.


def parse(argv: list[str] | None) -> argparse.Namespace:
    from quire.config import EngineConfig, add_arguments

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="model folder in Hugging Face format")
    parser.add_argument("--transformers-python", required=True, metavar="PYTHON", help="a Python that has transformers and torch")
    parser.add_argument("--requests", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-mean", type=float, default=128, metavar="TOKENS")
    parser.add_argument("--output-mean", type=float, default=128, metavar="TOKENS")
    parser.add_argument("--cap", type=int, default=512, metavar="TOKENS", help="longest prompt, and longest output (default: 512)")
    parser.add_argument(
        "--one-at-a-time", type=int, default=16, metavar="N", help="requests that transformers runs one at a time (default: 16)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[8, 16, 32], metavar="N")
    parser.add_argument("--order", choices=("sorted", "given"), default="sorted", help="of the requests in static batches")
    parser.add_argument("--transformers-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="width of transformers' weights and KV (default: float32, the fastest on most CPUs)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    add_arguments(parser, EngineConfig)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    from quire.config import EngineConfig, resolve
    from quire.errors import QuireError

    args = parse(argv)
    try:
        (config,) = resolve((EngineConfig,), vars(args))
        compare(args, config)
    except QuireError as e:
        print(f"against_transformers: {e.message}", file=sys.stderr)
        return e.exit_code
    return 0


def compare(args: argparse.Namespace, config: Any) -> None:
    from quire import LLM, SamplingParams, __version__
    from quire.workload import Lengths, synthetic

    threads = config.threads or len(os.sched_getaffinity(0))
    llm = LLM.from_config(config)
    dtype = llm.backend.spec.dtype if config.dtype == "auto" else config.dtype
    prompt, output = (Lengths(mean, cap=args.cap) for mean in (args.prompt_mean, args.output_mean))
    requests = synthetic(args.requests, prompt, output, llm.backend.spec.vocab_size, config.seed)
    prompts: list[Any] = [{"prompt_token_ids": r.prompt_token_ids} for r in requests]
    params = [SamplingParams(temperature=0, max_tokens=r.output_tokens, ignore_eos=True) for r in requests]
    llm.generate(prompts[:2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)

    def run_quire() -> Run:
        start = perf_counter()
        outputs = [made.outputs[0].token_ids for made in llm.generate(prompts, params, use_tqdm=False)]
        elapsed = perf_counter() - start
        assert [len(tokens) for tokens in outputs] == [r.output_tokens for r in requests]
        return Run(elapsed, sum(len(r.prompt_token_ids) for r in requests), sum(map(len, outputs)), outputs)

    other = Transformers(args.transformers_python, {
        "model": str(Path(args.model).resolve()), "threads": threads, "dtype": args.transformers_dtype,
        "workload": [(r.prompt_token_ids, r.output_tokens) for r in requests],
    })  # fmt: skip
    one = min(args.one_at_a_time, len(requests))
    contenders: dict[str, Callable[[], Run]] = {"Quire": run_quire}
    if one:
        contenders[f"transformers, one at a time ({one} of {len(requests)} requests)"] = partial(other.run, 1, "given", one)
    for size in args.batch_sizes:
        contenders[f"transformers, batches of {size}, {args.order}"] = partial(other.run, size, args.order, len(requests))
    runs = measure(contenders, args.rounds)
    other.close()

    same = [_same(runs, name, one) for name in runs if "one at a time" in name]
    table = {name: summary(measured) for name, measured in runs.items()}
    quire, rest = table["Quire"], [row for name, row in table.items() if name != "Quire"]
    best = max((row["output_tokens_per_s"]["median"] for row in rest), default=None)
    result = {
        "model": Path(args.model).name,
        "machine": {"cpu": _cpu_name(), "threads": threads, "system": platform.platform(), "python": platform.python_version()},
        "versions": {"quire": __version__, **other.versions},
        "workload": {"requests": len(requests), "prompt": asdict(prompt), "output": asdict(output), "seed": config.seed},
        "widths": {"quire_weights": dtype, "quire_kv": config.kv_dtype, "transformers": args.transformers_dtype},
        "rounds": args.rounds,
        "results": table,
        "quire_to_best_transformers": None if best is None else quire["output_tokens_per_s"]["median"] / best,
        "same_outputs": same[0] if same else None,
    }
    print(describe(result))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(contenders: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Runs of each, in rounds; every other round in reverse order, so that a drift of the machine favours nobody."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            run = contenders[name]()
            runs[name].append(run)
            print(f"round {number + 1}: {name}: {run.output_tokens_per_s:.1f} output tokens/s", file=sys.stderr, flush=True)
    return runs


def summary(runs: list[Run]) -> dict[str, Any]:
    def spread(values: list[float]) -> dict[str, float]:
        return {"median": median(values), "min": min(values), "max": max(values)}

    return {
        "elapsed_s": spread([r.elapsed_s for r in runs]),
        "output_tokens_per_s": spread([r.output_tokens_per_s for r in runs]),
        "total_tokens_per_s": spread([(r.prompt_tokens + r.output_tokens) / r.elapsed_s for r in runs]),
        "prompt_tokens": runs[0].prompt_tokens,
        "output_tokens": runs[0].output_tokens,
    }


def _same(runs: dict[str, list[Run]], name: str, count: int) -> dict[str, int]:
    """How many requests got the same greedy tokens. Rounding differs, so a near tie may go either way, and what follows differs."""
    quire, other = runs["Quire"][0].token_ids[:count], runs[name][0].token_ids
    return {
        "requests": count,
        "same_tokens": sum(a == b for a, b in zip(quire, other, strict=True)),
        "same_first_token": sum(a[0] == b[0] for a, b in zip(quire, other, strict=True)),
    }


def describe(result: dict[str, Any]) -> str:
    machine, widths, work, versions = result["machine"], result["widths"], result["workload"], result["versions"]
    lines = [
        f"{result['model']}, {machine['cpu']}, {machine['threads']} threads; Quire {versions['quire']}, "
        f"transformers {versions['transformers']}, torch {versions['torch']}",
        f"{work['requests']} requests, prompts {work['prompt']['mean']:g} and outputs {work['output']['mean']:g} tokens on average",
        f"Quire: weights {widths['quire_weights']}, KV {widths['quire_kv']}; transformers: both {widths['transformers']}",
        "",
        f"{'output tokens/s':<58}{'median':>9}{'min':>9}{'max':>9}",
    ]
    for name, row in result["results"].items():
        rate = row["output_tokens_per_s"]
        lines.append(f"{name:<58}{rate['median']:>9.1f}{rate['min']:>9.1f}{rate['max']:>9.1f}")
    if (ratio := result["quire_to_best_transformers"]) is not None:
        lines += ["", f"Quire / best of transformers: {ratio:.2f}"]
    if (same := result["same_outputs"]) is not None:
        lines.append(
            f"same greedy tokens: {same['same_tokens']} of {same['requests']} requests; same first token: {same['same_first_token']}"
        )
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    if sys.argv[1:] == ["--transformers-side"]:
        transformers_side()
    else:
        sys.exit(main())
