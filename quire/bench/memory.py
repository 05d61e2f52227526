"""How much of a KV pool holds tokens: paged and contiguous memory, under the engine's own scheduler and block manager.

All requests are there from the start, and come in, in their order, as soon as the memory lets them. They enter the engine's
queue shortly before their turn, so that the tokens of a long trace need not be in memory. Without a model a step takes no time,
and a sequence ends at its length; the engine does not know that length, the reservations ``pow2`` and ``oracle`` do.

What is reported are means over steps (as in the PagedAttention paper, arXiv 2309.06180, Fig. 2), from the first step that
left a request waiting to the last one before the queue was empty: what a full pool looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from tqdm import tqdm

from quire.bench.memory_executors import Forced, NoModel
from quire.bench.memory_plot import MemoryRun
from quire.bench.memory_tally import Tally
from quire.config import EngineConfig
from quire.core.contiguous import RESERVATIONS, Buddy, ContiguousAllocator, ContiguousManager, FirstCome, FirstFit, reservation
from quire.core.engine import Engine, Executor
from quire.core.sequence import Request, derive_seed
from quire.errors import ConfigError
from quire.models.weights import load_spec, resolve_model
from quire.sampling_params import SamplingParams
from quire.workload import TraceRequest, prompt_token_ids

PAGED = "paged"
POLICIES = (PAGED, *RESERVATIONS)
ALLOCATORS: dict[str, type[ContiguousAllocator]] = {"buddy": Buddy, "first-fit": FirstFit}
MAX_BLOCK_SIZE = 1024
"""Without a model."""
RUN_UNIT = 4
"""Positions in a unit of contiguous memory where a model runs on it: its smallest block. Without a model it is 1."""
QUEUE = 512
"""Sequences that wait in the engine: more requests come when there are fewer."""
NUM_SEQS, NUM_SEQS_EXECUTED = 4096, 1024
"""Most sequences at once where nothing is said: as many as an engine can have, or what a model's buffers allow."""


@dataclass(slots=True, frozen=True)
class Layout:
    """A way of handing out the pool."""

    policy: str
    allocator: str | None = None
    """None for paged memory."""
    block_size: int | None = None
    """None for contiguous memory."""


@dataclass(slots=True, frozen=True)
class Load:
    """What is run, and in how much memory."""

    requests: Sequence[TraceRequest]
    pool: int = 15_700
    """Token positions; what makes no whole block is left out."""
    max_len: int = 2048
    """The longest sequence that the server allows, prompt and output together."""
    n: int = 1
    """Samples of each request, all of its length."""
    beam_width: int | None = None
    seed: int = 0
    """Draws the tokens of the prompts."""
    admission: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    """None: without a model a prompt takes one step; with one, EngineConfig's default."""
    model: str | None = None
    """None: no model runs."""


class Result(MemoryRun):
    """One run, as ``--json`` writes it."""

    n: int
    beam_width: int | None
    pool_tokens: int
    """Token positions of the pool, in whole blocks."""
    requests: int
    useful_tokens: int
    """Prompt and output tokens, each prompt once."""
    recomputed_per_useful: float
    steps: int
    counted_steps: int
    """Those that the means are over."""
    saturated: bool
    """Some request had to wait. If not, the means are over all steps."""
    limited_by_sequences: bool
    """A request had to wait because ``max_num_seqs`` sequences ran."""
    max_sequences: int
    """That ran at once."""
    seconds: float
    """That the run took."""


def layouts(policies: Sequence[str], allocators: Sequence[str], block_sizes: Sequence[int]) -> list[Layout]:
    """Every combination that there is, in this order. ConfigError for an unknown name."""
    for option, names, known in (("--policy", policies, POLICIES), ("--allocator", allocators, tuple(ALLOCATORS))):
        for name in names:
            if name not in known:
                raise ConfigError(f"{option} {name!r} is not supported; choose from: {', '.join(known)}")
    found = []
    for policy in policies:
        if policy == PAGED:
            found += [Layout(PAGED, None, size) for size in block_sizes]
        else:
            found += [Layout(policy, allocator) for allocator in allocators]
    return found


def ended_by(requests: Sequence[TraceRequest], max_len: int) -> list[TraceRequest]:
    """The requests as a server with ``max_len`` positions runs them: an output ends where the context does. What does not fit
    even so, for its prompt, stays as it is."""
    return [
        replace(r, output_tokens=max_len - r.prompt_tokens) if r.prompt_tokens < max_len < r.prompt_tokens + r.output_tokens else r
        for r in requests
    ]


def check(load: Load, layout: Layout) -> None:
    """Raises ConfigError where ``layout`` can't run ``load``, with the numbers and the remedy."""
    for option, value, low in (("--pool", load.pool, 1), ("--max-len", load.max_len, 2)):
        if value < low:
            raise ConfigError(f"{option} must be at least {low}, got {value}")
    lengths = [request.prompt_tokens + request.output_tokens for request in load.requests]
    if (longest := max(lengths)) > load.max_len:
        raise ConfigError(
            f"{sum(length > load.max_len for length in lengths):,} of the {len(lengths):,} requests are longer than --max-len "
            f"{load.max_len:,}, prompt and output together: pass --max-len {longest}, or leave the long ones out of the trace"
        )
    size = layout.block_size
    if size is not None and load.model is None and not (1 <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0):
        raise ConfigError(f"--block-size must be a power of two from 1 to {MAX_BLOCK_SIZE}, got {size}")
    unit = _unit(load, layout)
    fits = load.pool // unit * unit
    if fits < load.max_len:
        raise ConfigError(
            f"--pool {load.pool:,} holds {fits:,} positions in blocks of {unit}, less than one sequence of --max-len {load.max_len:,}: "
            "raise --pool, or lower --max-len"
        )
    if layout.allocator is None:
        return
    if load.beam_width is not None:
        raise ConfigError("--beam-width works with --policy paged only: beams share memory, and contiguous memory can't be shared")
    run = ALLOCATORS[layout.allocator](load.pool // unit).largest_free_run * unit
    asked = max(reservation(layout.policy, r.prompt_tokens, r.output_tokens, load.max_len) for r in load.requests)
    if asked > run:
        raise ConfigError(
            f"--policy {layout.policy} reserves up to {asked:,} positions for a sequence, but the longest run that --allocator "
            f"{layout.allocator} can hand out of --pool {load.pool:,} is {run:,}: raise --pool, lower --max-len, or leave them out"
        )


def run(load: Load, layout: Layout) -> Result:
    """Run ``load`` to its end under ``layout``. Raises as ``check``, and what opening a model raises."""
    check(load, layout)
    start = perf_counter()
    device, config, eos = _open(load, layout)
    outputs: dict[int, int] = {}  # a sequence's seed → tokens that it generates
    ends: dict[int, int] = {}  # → positions that it has computed at its end: all but the last token's
    forced = Forced(device, outputs, eos[0])
    if layout.allocator is None:
        engine = Engine(forced, config)
    else:
        memory = ContiguousManager(
            ALLOCATORS[layout.allocator](device.num_blocks),
            device.block_size,
            lambda seq: reservation(layout.policy, seq.num_prompt, outputs[seq.seed], load.max_len),
        )
        engine = Engine(forced, config, manager=memory, policy=FirstCome(memory))
    tally = Tally(engine.scheduler, ends, config.num_seqs(device.num_blocks))
    forced.watch = tally.see
    waiting, samples = engine.scheduler.waiting, load.n * len(load.requests)
    steps = submitted = 0
    with tqdm(
        total=samples, desc=f"{layout.policy} {layout.allocator or layout.block_size}", unit="sample", delay=1, disable=None
    ) as progress:
        while engine.has_work or submitted < len(load.requests):
            while submitted < len(load.requests) and len(waiting) < QUEUE:
                work = load.requests[submitted]
                for index in range(load.n):
                    outputs[seed := derive_seed(submitted, index)] = work.output_tokens
                    ends[seed] = work.prompt_tokens + work.output_tokens - 1
                engine.add(_request(load, submitted, device.spec.vocab_size, eos))
                submitted += 1
            tally.more = submitted < len(load.requests)
            if ended := sum(output.finish_reason is not None for output in engine.step()):
                progress.update(ended)
            steps += 1
    counters = engine.scheduler.manager.counters
    useful = sum(r.prompt_tokens + load.n * r.output_tokens for r in load.requests)
    positions = max(1, tally.positions)
    return {
        "policy": layout.policy,
        "allocator": layout.allocator,
        "block_size": layout.block_size or (RUN_UNIT if load.model else None),
        "token_share": tally.tokens / positions,
        "reserved_share": tally.reserved / positions,
        "internal_share": (tally.owned - tally.tokens - tally.reserved) / positions,
        "external_share": 1 - tally.owned / positions,
        "mean_sequences": tally.sequences / max(1, tally.steps),
        "preemptions": counters.preemptions,
        "recomputed_tokens": counters.tokens_recomputed,
        "hit_share": counters.hit_tokens / counters.prompt_tokens,
        "saved_share": tally.saved / max(1, tally.steps),
        "n": load.n,
        "beam_width": load.beam_width,
        "pool_tokens": device.num_blocks * device.block_size,
        "requests": len(load.requests),
        "useful_tokens": useful,
        "recomputed_per_useful": counters.tokens_recomputed / useful,
        "steps": steps,
        "counted_steps": tally.steps,
        "saturated": tally.saturated,
        "limited_by_sequences": tally.limited_by_rows,
        "max_sequences": tally.max_sequences,
        "seconds": perf_counter() - start,
    }


def _request(load: Load, number: int, vocab_size: int, eos: tuple[int, ...]) -> Request:
    """Its number is its seed: the executor knows its sequences by it."""
    work = load.requests[number]
    # The model may not end it before its length; then the executor does.
    params = SamplingParams(n=load.n, beam_width=load.beam_width, max_tokens=None, min_tokens=work.output_tokens - 1)
    return Request(str(number), prompt_token_ids(work, number, vocab_size, load.seed), params, number, eos)


def _unit(load: Load, layout: Layout) -> int:
    """Block size of the engine."""
    return layout.block_size or (1 if load.model is None else RUN_UNIT)


def _open(load: Load, layout: Layout) -> tuple[Executor, EngineConfig, tuple[int, ...]]:
    """What the engine runs on, how, and the tokens that end a text."""
    unit = _unit(load, layout)
    blocks = load.pool // unit
    config = EngineConfig(
        max_model_len=load.max_len,
        admission=load.admission,
        max_waiting=1 << 20,
        max_num_seqs=min(load.max_num_seqs or (NUM_SEQS if load.model is None else NUM_SEQS_EXECUTED), blocks),
        max_num_batched_tokens=load.max_num_batched_tokens or (1 << 20 if load.model is None else EngineConfig.max_num_batched_tokens),
    )
    if load.model is None:
        device = NoModel(blocks, unit, load.max_len)
        return device, config, (device.spec.vocab_size - 1,)
    from quire.llm import LLM

    spec = load_spec(resolve_model(load.model))
    size = blocks * unit * spec.kv_bytes_per_token(config.kv_dtype)
    config = replace(config, model=load.model, block_size=unit, kv_memory=str(size))
    backend = LLM.from_config(config).backend
    return backend, config, backend.spec.eos_token_ids or (0,)
