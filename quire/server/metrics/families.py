"""Every metric of the server: its name, what it means, its value now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from quire import __version__
from quire.core.stats import EngineStats, KVStats, Queue
from quire.models.spec import ModelCost
from quire.server.engine.client import EngineClient
from quire.server.metrics.histogram import Histogram
from quire.server.metrics.meter import RequestMeter

NO_LABELS: Mapping[str, str] = {}
Value = float | Histogram


@dataclass(slots=True)
class Metric:
    """``name`` has no ``_total``: a counter gets it when it is written."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    help: str
    samples: list[tuple[Mapping[str, str], Value]]


def gauge(name: str, help: str, value: float) -> Metric:
    return Metric("gauge", name, help, [(NO_LABELS, value)])


def counter(name: str, help: str, value: float) -> Metric:
    return Metric("counter", name, help, [(NO_LABELS, value)])


def labelled(kind: Literal["gauge", "counter"], name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    return Metric(kind, name, help, [({label: key}, value) for key, value in values.items()])


def families(client: EngineClient, model: str, cost: ModelCost | None, machine_limits: tuple[float, float] | None) -> Iterator[Metric]:
    """All of them. While the engine is away nothing runs and its pool is empty; counters stay where they are.

    machine_limits: bytes read and operations per second, as measured; None where that was not asked for.
    """
    info = {"version": __version__, "model": model, "architecture": cost.spec.architecture if cost else ""}
    yield Metric("gauge", "quire_info", "1; the labels say what is served, and by which version", [(info, 1.0)])
    yield from _requests(client.meter)
    yield from _engine(client)
    counters, last = client.totals.counters(), client.totals.last
    if last is not None:
        yield from _memory(last.kv if client.totals.stats is not None else _empty(last.kv), counters)
    yield from _steps(counters)
    if cost is not None:
        done = cost.of(client.totals.extent())
        yield counter("quire_flops", "operations of the model, two for each multiply-add", done.flops)
        yield counter("quire_read_bytes", "memory that steps read at least: weights, and the KV of every row", done.bytes_read)
        if machine_limits is not None:
            read, compute = machine_limits
            yield gauge("quire_machine_read_bytes_per_second", "memory bandwidth of this machine, measured at the start", read)
            yield gauge("quire_machine_flops_per_second", "arithmetic of this machine, measured at the start", compute)


def _requests(m: RequestMeter) -> Iterator[Metric]:
    yield counter("quire_requests_received", "requests that were taken; each prompt of a call is one", m.received)
    yield labelled("counter", "quire_requests_finished", "requests that have ended, by how", "finished_reason", m.finished)
    yield labelled("counter", "quire_requests_rejected", "calls that were refused, by the code of their error", "reason", m.rejections)
    yield counter("quire_prompt_tokens", "tokens of the prompts that were computed or found", m.prompt_tokens)
    yield counter("quire_prompt_tokens_cached", "tokens of prompts that were found in the prefix cache", m.cached_tokens)
    yield counter("quire_generation_tokens", "tokens that were generated", m.generation_tokens)
    for name, help, histogram in (
        ("time_to_first_token_seconds", "from a request's arrival to its first token", m.time_to_first_token),
        ("inter_token_latency_seconds", "from one token of a sequence to its next", m.inter_token_latency),
        ("request_seconds", "from the arrival of a request that was answered to its end", m.e2e),
        ("request_queue_seconds", "from a request's arrival to its start", m.queue),
        ("request_prefill_seconds", "from a request's start to its first token", m.prefill),
        ("request_decode_seconds", "from the first token of a request that was answered to its last", m.decode),
        ("request_inference_seconds", "from the start of a request that was answered to its last token", m.inference),
        ("request_time_per_output_token_seconds", "mean of a request's times between tokens", m.time_per_output_token),
        ("request_prompt_tokens", "tokens of a request's prompt", m.request_prompt_tokens),
        ("request_generation_tokens", "tokens that a request generated", m.request_generation_tokens),
        ("request_samples", "n of a request", m.request_n),
        ("request_max_tokens", "max_tokens of a request that states it", m.request_max_tokens),
        ("request_preemptions", "how often a request was preempted", m.request_preemptions),
    ):
        yield Metric("histogram", f"quire_{name}", help, [(NO_LABELS, histogram)])


def _engine(client: EngineClient) -> Iterator[Metric]:
    stats = client.totals.stats
    unsent = client.num_unsent
    queue = {name: float(value) for name, value in asdict(stats.queue if stats is not None else Queue()).items()}
    queue |= {"engine": 0.0 if client.up else unsent, "suspect": unsent if client.up and client.num_suspects else 0.0}
    yield gauge("quire_engine_up", "1 while there is an engine that runs requests", client.up)
    yield counter("quire_engine_restarts", "engines that took the place of one that died", client.restarts)
    yield gauge("quire_requests_suspected", "requests that are tried alone, since engines died with them", client.num_suspects)
    yield gauge("quire_sequences_in_flight", "sequences that were taken and have not ended", client.in_flight)
    yield gauge("quire_sequences_running", "sequences that run", _running(stats))
    yield gauge("quire_sequences_waiting", "sequences that wait to be started", sum(queue.values()))
    yield labelled(
        "gauge",
        "quire_sequences_waiting_by_reason",
        "what they wait for: memory, a row (--max-num-seqs), the same prompt that another computes, the step's budget of positions, an "
        "engine, or the end of a suspected request's trial",
        "reason",
        queue,
    )


def _running(stats: EngineStats | None) -> int:
    return 0 if stats is None else stats.running


def _empty(kv: KVStats) -> KVStats:
    """The pool of an engine that is away, with the counters that the last one had."""
    return KVStats(
        kv.num_blocks,
        kv.block_size,
        kv.num_blocks,
        0,
        largest_free_run=kv.num_blocks,
        host_blocks=kv.host_blocks,
        groups=kv.groups,
        counters=kv.counters,
    )


def _memory(kv: KVStats, counters: Counter[str]) -> Iterator[Metric]:
    yield gauge("quire_kv_pool_blocks", "blocks of the KV pool", kv.num_blocks)
    yield gauge("quire_kv_block_tokens", "token positions of a block", kv.block_size)
    yield gauge("quire_kv_block_groups", "blocks that a position takes: one for each group of layers that see equally far", kv.groups)
    states = {"owned": kv.used_blocks, "cached": kv.cached_blocks, "empty": kv.free_blocks - kv.cached_blocks}
    yield labelled("gauge", "quire_kv_blocks", "owned by a sequence, idle with content that can be found, or empty", "state", states)
    yield gauge("quire_kv_usage_ratio", "share of the pool that sequences own", kv.used_blocks / kv.num_blocks)
    yield gauge("quire_kv_positions_used", "positions that hold a running sequence's tokens, in each group of layers", kv.positions_used)
    yield gauge("quire_kv_positions_allocated", "positions of the blocks that sequences own", kv.positions_allocated)
    yield gauge("quire_kv_positions_empty_tail", "allocated positions that hold nothing: the empty parts of last blocks", kv.empty_tail)
    yield gauge("quire_kv_blocks_shared", "blocks with several owners", kv.shared_blocks)
    yield gauge("quire_kv_blocks_saved", "blocks that sharing saves", kv.saved_blocks)
    yield gauge("quire_kv_largest_free_run_blocks", "most free blocks with consecutive ids", kv.largest_free_run)
    yield gauge("quire_kv_fragmentation_ratio", "share of the free blocks that no contiguous allocator could use at once", kv.fragmentation)
    host = {"used": kv.host_blocks_used, "free": kv.host_blocks - kv.host_blocks_used}
    yield labelled("gauge", "quire_kv_host_blocks", "blocks of the swap pool", "state", host)
    yield counter("quire_kv_blocks_copied", "blocks copied before a write, since they had several owners", counters["blocks_copied"])
    swapped = {way: counters[f"blocks_swapped_{way}"] for way in ("out", "in")}
    yield labelled("counter", "quire_kv_blocks_swapped", "blocks moved to the swap pool, and back", "direction", swapped)
    preempted = {str(cause): counters[f"preempted_{cause}"] for cause in kv.counters.preempted}
    yield labelled(
        "counter",
        "quire_preemptions",
        "sequences that gave their blocks back: no block was left, somebody came before them, or beams waited for each other",
        "cause",
        preempted,
    )


def _steps(counters: Counter[str]) -> Iterator[Metric]:
    yield counter("quire_steps", "steps of the engine", counters["extent_steps"])
    yield counter("quire_positions_computed", "positions computed, again or in vain included", counters["extent_positions"])
    yield counter("quire_positions_recomputed", "positions computed again after a preemption", counters["tokens_recomputed"])
    yield counter(
        "quire_positions_discarded",
        "positions computed for sequences that had ended, which was known when their next step was in flight",
        counters["positions_discarded"],
    )
    yield counter("quire_tokens_drafted", "tokens that were guessed and verified", counters["tokens_drafted"])
    yield counter("quire_tokens_accepted", "guessed tokens that were right", counters["tokens_accepted"])
    phases = {phase: counters[f"seconds_{phase}"] for phase in ("schedule", "execute", "sample", "commit", "send")}
    yield labelled("counter", "quire_step_seconds", "time of the engine, by what it did", "phase", phases)
