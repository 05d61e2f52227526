"""Offline throughput: all requests at once, as fast as the engine goes; and how far that is from what the machine can do.

Everything is counted in tokens: no text is made. Output lengths are forced (end-of-text does not end a request), so that
two runs do the same work whatever the model says.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

from quire import __version__
from quire.bench.recorder import Recorder, Step
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.core.stats import EngineStats
from quire.llm import LLM
from quire.sampling_params import SamplingParams
from quire.workload import Lengths, WorkloadRequest, synthetic

WARM_UP = WorkloadRequest([0] * 32, 8)
"""Run before the clock starts: the first steps touch fresh memory and wake the threads."""


@dataclass(slots=True, frozen=True)
class Limits:
    """What the machine can do at most, measured with the threads that run the model."""

    bytes_per_s: float
    """Reading memory."""
    flops_per_s: float
    """Two operations per multiply-add, of ``arithmetic``."""
    arithmetic: str
    """What the linears multiply: float32, bfloat16, float16 or int8."""


@dataclass(slots=True)
class KVUse:
    """How well the KV pool is used; means over steps."""

    used_of_allocated: float
    """Positions that hold tokens, of all positions in blocks with an owner."""
    used_of_pool: float
    """Positions that hold tokens, of the whole pool."""
    peak_used_of_pool: float
    pool_positions: int
    groups: int = 1
    """Of layers, each of which has positions of its own."""


@dataclass(slots=True)
class Throughput:
    """The result. ``asdict`` of it is what ``--json`` writes."""

    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output tokens."""
    requests_per_s: float
    elapsed_s: float
    backend_s: float
    """Of which in the backend; the rest is scheduling."""
    requests: int
    prompt_tokens: int
    output_tokens: int
    steps: int
    mean_batch: float
    """Sequences that run in a step, on average."""
    preemptions: int
    tokens_recomputed: int
    tokens_drafted: int
    """Tokens that were guessed, and verified."""
    tokens_accepted: int
    """Those that were right."""
    kv: KVUse
    flops: int
    bytes_read: int
    limits: Limits
    compute_fraction: float
    """flops, of what the machine could have done in the time."""
    bandwidth_fraction: float
    """bytes_read, of what the machine could have read in the time."""
    reached_fraction: float
    """Least time of each step (reading or computing, whichever takes longer), summed, of the time that it took."""
    workload: dict[str, Any]
    engine: dict[str, Any]
    quire: str = __version__
    python: str = platform.python_version()


def run(config: EngineConfig, num_requests: int, prompt: Lengths, output: Lengths) -> Throughput:
    """Load the model and run ``num_requests`` synthetic requests, drawn from ``config.seed``.

    Raises what loading a model raises; ContextLengthError where the lengths do not fit the model's context.
    """
    llm = LLM.from_config(config)
    spec = llm.backend.spec
    workload = synthetic(num_requests, prompt, output, spec.vocab_size, config.seed)
    recorder = Recorder(llm.backend, llm.cost())
    engine = Engine(recorder, config)
    for request in (_request(0, WARM_UP), *(_request(i, w) for i, w in enumerate(workload))):
        engine.limits.check(request.prompt_token_ids, request.params)
    limits = Limits(*llm.backend.limits(), llm.backend.arithmetic)
    _drain(engine, [WARM_UP])
    before, recorder.steps = engine.stats(), []
    start = perf_counter()
    samples = _drain(engine, workload)
    elapsed = perf_counter() - start
    result = _summarize(workload, elapsed, recorder.steps, samples, before, engine.stats(), limits)
    result.workload = {"requests": num_requests, "prompt": asdict(prompt), "output": asdict(output), "seed": config.seed}
    result.engine = {**asdict(config.as_stored(spec.quantized)), "max_model_len": recorder.max_model_len}
    return result


def _request(number: int, work: WorkloadRequest) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=work.output_tokens, ignore_eos=True)
    return Request(str(number), work.prompt_token_ids, params, seed=number)


def _drain(engine: Engine, workload: list[WorkloadRequest]) -> list[EngineStats]:
    """Run all requests to their end; the engine's statistics after each step."""
    for number, work in enumerate(workload):
        engine.add(_request(number, work))
    samples = []
    while engine.has_work:
        engine.step()
        samples.append(engine.stats())
    return samples


def _summarize(
    workload: list[WorkloadRequest],
    elapsed: float,
    steps: list[Step],
    samples: list[EngineStats],
    before: EngineStats,
    after: EngineStats,
    limits: Limits,
) -> Throughput:
    prompt_tokens, output_tokens = sum(len(w.prompt_token_ids) for w in workload), sum(w.output_tokens for w in workload)
    flops, bytes_read = sum(s.cost.flops for s in steps), sum(s.cost.bytes_read for s in steps)
    least = sum(max(s.cost.flops / limits.flops_per_s, s.cost.bytes_read / limits.bytes_per_s) for s in steps)
    return Throughput(
        output_tokens_per_s=output_tokens / elapsed,
        total_tokens_per_s=(prompt_tokens + output_tokens) / elapsed,
        requests_per_s=len(workload) / elapsed,
        elapsed_s=elapsed,
        backend_s=sum(s.seconds for s in steps),
        requests=len(workload),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        steps=len(steps),
        mean_batch=fmean(s.sequences for s in steps),
        preemptions=after.preemptions - before.preemptions,
        tokens_recomputed=after.tokens_recomputed - before.tokens_recomputed,
        tokens_drafted=after.tokens_drafted - before.tokens_drafted,
        tokens_accepted=after.tokens_accepted - before.tokens_accepted,
        kv=_kv_use(samples),
        flops=flops,
        bytes_read=bytes_read,
        limits=limits,
        compute_fraction=flops / limits.flops_per_s / elapsed,
        bandwidth_fraction=bytes_read / limits.bytes_per_s / elapsed,
        reached_fraction=least / elapsed,
        workload={},
        engine={},
    )


def _kv_use(samples: list[EngineStats]) -> KVUse:
    pool = samples[0].kv.num_blocks * samples[0].kv.block_size
    used = [s.kv.positions_used / pool for s in samples]
    owned = [s.kv.positions_used / s.kv.positions_allocated for s in samples if s.kv.positions_allocated]
    return KVUse(fmean(owned) if owned else 0.0, fmean(used), max(used), pool, samples[0].kv.groups)


def describe(r: Throughput) -> str:
    """The result as a table for the terminal."""
    share = f"{r.tokens_accepted / r.output_tokens:.1%} of the output, of {r.tokens_drafted:,} tokens that were guessed (--speculation)"
    each = f" of {r.kv.groups} groups of layers" if r.kv.groups > 1 else ""
    drafts = [("speculation", f"{r.tokens_accepted:,}", share)] if r.tokens_drafted else []
    rows = [
        ("requests", f"{r.requests:,}", f"{r.prompt_tokens:,} prompt + {r.output_tokens:,} output tokens in {r.elapsed_s:.2f} s"),
        ("output", f"{r.output_tokens_per_s:,.1f} tokens/s", f"{r.requests_per_s:.2f} requests/s"),
        ("total", f"{r.total_tokens_per_s:,.1f} tokens/s", "prompt and output"),
        ("batch", f"{r.mean_batch:.1f}", f"sequences in a step, mean over {r.steps:,} steps; {1000 * r.elapsed_s / r.steps:.1f} ms a step"),
        ("preemptions", f"{r.preemptions:,}", f"{r.tokens_recomputed:,} positions computed again"),
        *drafts,
        ("KV of blocks", f"{r.kv.used_of_allocated:.1%}", "of the positions in allocated blocks hold tokens"),
        (
            "KV of pool",
            f"{r.kv.used_of_pool:.1%}",
            f"mean, {r.kv.peak_used_of_pool:.1%} at most, of {r.kv.pool_positions:,} positions{each}",
        ),
        ("scheduling", f"{1 - r.backend_s / r.elapsed_s:.1%}", "of the time is spent outside the backend"),
        (
            "memory",
            f"{r.limits.bytes_per_s / 1e9:.1f} GB/s",
            f"read bandwidth, measured; {r.bandwidth_fraction:.1%} of it used for weights and KV",
        ),
        (
            "arithmetic",
            f"{r.limits.flops_per_s / 1e9:,.0f} {'GOP/s' if r.limits.arithmetic == 'int8' else 'GFLOP/s'}",
            f"{r.limits.arithmetic}, measured; {r.compute_fraction:.1%} of it used",
        ),
        ("reached", f"{r.reached_fraction:.1%}", "of the speed at which every step is bound by memory or arithmetic alone"),
    ]
    return "\n".join(f"{name:<13}{value:>18}   {note}" for name, value, note in rows)
