"""What the memory system costs and saves on the model itself: ratios of throughputs, alternating in one run.

    python benchmarks/memory_costs.py [MODEL] [--requests 64] [--prompt 128] [--output 128] [--rounds 5] [--json FILE]

The pools are written once before anything is measured: the first write to a page of fresh memory costs about as much as the
system's page faults, once, and a cache reaches fresh pages where a pool without one reuses those that it has.

- cache: random prompts, which never hit, with the prefix cache on against off. The work is the same; the difference is the
  cost of publishing.
- quarter: all requests at once in a pool that holds them all, against a quarter of it (preemption by recompute, and by swap).
  The outputs must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from quire.backends.base import open_backend
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.models.weights import load_spec, resolve_model
from quire.sampling_params import SamplingParams
from quire.workload import Lengths, synthetic


@dataclass
class Result:
    tokens_per_s: float
    outputs: dict[tuple[str, int], list[int]]
    stats: Any


def run(engine: Engine, requests: list[Request]) -> Result:
    """All at once, to the end; output tokens per second."""
    for request in requests:
        engine.add(request)
    outputs: dict[tuple[str, int], list[int]] = {}
    start = perf_counter()
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    seconds = perf_counter() - start
    return Result(sum(map(len, outputs.values())) / seconds, outputs, engine.stats())


def compare(name: str, variants: dict[str, tuple[dict[str, Any], list[list[Request]]]]) -> dict[str, Any]:
    """Run every variant in each round, in alternating order, each on an engine of its own. Ratios are to the first variant."""
    engines = {}
    for label, (options, _) in variants.items():
        config = EngineConfig(**options)
        backend: Any = open_backend(config)
        backend.decoder.poison_blocks(list(range(backend.num_blocks)))
        engines[label] = Engine(backend, config)
    rounds = len(next(iter(variants.values()))[1])
    speeds: dict[str, list[float]] = {label: [] for label in variants}
    stats: dict[str, Any] = {}
    same = True
    for number in range(rounds):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        results = {}
        for label in order:
            results[label] = run(engines[label], variants[label][1][number])
            speeds[label].append(results[label].tokens_per_s)
            stats[label] = results[label].stats
        first = next(iter(variants))
        same = same and all(result.outputs == results[first].outputs for result in results.values())
    base = speeds[next(iter(variants))]
    print(f"{name}: outputs {'equal' if same else 'DIFFER'}")
    rows = {}
    for label, values in speeds.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        kv = stats[label].kv
        rows[label] = {
            "tokens_per_s": median(values),
            "ratio": median(ratios),
            "ratios": ratios,
            "preemptions": kv.counters.preemptions,
            "tokens_recomputed": kv.counters.tokens_recomputed,
            "blocks_swapped_in": kv.counters.blocks_swapped_in,
            "hit_rate": kv.hit_rate,
        }
        print(
            f"  {label:<22}{median(values):9.1f} tokens/s  ratio {median(ratios):6.3f}  (rounds {min(ratios):.3f} to {max(ratios):.3f})  "
            f"preemptions {kv.counters.preemptions:,}, recomputed {kv.counters.tokens_recomputed:,}, hits {kv.hit_rate:.1%}"
        )
    return {"same_outputs": same, "variants": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("cache", "quarter"))
    parser.add_argument("--json")
    args = parser.parse_args()
    spec = load_spec(resolve_model(args.model))
    prompt, output = (Lengths(mean, 0.5, 3 * mean) for mean in (args.prompt, args.output))

    def requests(seed: int) -> list[Request]:
        made = synthetic(args.requests, prompt, output, spec.vocab_size, seed)
        return [
            Request(str(i), r.prompt_token_ids, SamplingParams(max_tokens=r.output_tokens, ignore_eos=True), i) for i, r in enumerate(made)
        ]

    rounds = [requests(seed) for seed in range(args.rounds)]
    per_block = 16 * spec.kv_bytes_per_token("float16")
    whole = max(sum(-(-(len(r.prompt_token_ids) + (r.params.max_tokens or 0)) // 16) for r in batch) for batch in rounds)
    longest = max(len(r.prompt_token_ids) + (r.params.max_tokens or 0) for batch in rounds for r in batch)
    common = {"model": args.model, "max_num_seqs": args.requests, "max_model_len": longest}
    results = {}
    if args.only in (None, "cache"):
        size = str(4 * whole * per_block)
        results["cache"] = compare(
            "prefix cache at 0 % hits",
            {
                "off": ({**common, "kv_memory": size, "prefix_caching": False}, rounds),
                "on": ({**common, "kv_memory": size}, rounds),
            },
        )
    if args.only in (None, "quarter"):
        quarter = str(max(whole // 4, args.requests, -(-longest // 16)) * per_block)
        swap = str(whole * per_block)
        results["quarter"] = compare(
            f"a quarter of the pool ({whole} blocks for all {args.requests})",
            {
                "all fit": ({**common, "kv_memory": str((whole + args.requests) * per_block)}, rounds),
                "quarter": ({**common, "kv_memory": quarter}, rounds),
                "quarter, watermark": ({**common, "kv_memory": quarter, "admission": "watermark"}, rounds),
                "quarter, swap": ({**common, "kv_memory": quarter, "admission": "watermark", "swap_memory": swap}, rounds),
            },
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
