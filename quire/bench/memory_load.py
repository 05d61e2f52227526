"""What quire bench memory runs: requests, in how much memory, handed out in which way; and whether that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.config import DEFAULT_NUM_SEQS, EngineConfig
from quire.core.contiguous import RESERVATIONS, Buddy, ContiguousAllocator, FirstFit, reservation
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams
from quire.workload import TraceRequest

PAGED = "paged"
POLICIES = (PAGED, *RESERVATIONS)
ALLOCATORS: dict[str, type[ContiguousAllocator]] = {"buddy": Buddy, "first-fit": FirstFit}
MAX_BLOCK_SIZE = 1024
"""Without a model."""
NUM_SEQS, NUM_SEQS_EXECUTED = 4096, 1024
"""Most sequences at once where nothing is said: as many as an engine can have, or what a model's buffers allow."""
RUN_UNIT = 4
"""Positions in a unit of contiguous memory where a model runs on it: its smallest block. Without a model it is 1."""


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


def unit(load: Load, layout: Layout) -> int:
    """Positions in a block of the engine."""
    return layout.block_size or (1 if load.model is None else RUN_UNIT)


def engine_config(load: Load, layout: Layout) -> EngineConfig:
    """All but the model and its memory. ConfigError for a value that no engine takes."""
    most = NUM_SEQS if load.model is None else NUM_SEQS_EXECUTED
    if any(request.prefix_ids for request in load.requests):
        most = DEFAULT_NUM_SEQS["cpu"]  # with all at once, running sequences would hold what the cache is to keep
    config = EngineConfig(
        max_model_len=load.max_len,
        admission=load.admission,
        speculation="off",  # outputs are forced, one token a step
        max_waiting=1 << 20,
        # A sequence has at least one block.
        max_num_seqs=min(most if load.max_num_seqs is None else load.max_num_seqs, load.pool // unit(load, layout)),
    )
    if load.model is not None:
        config = replace(config, block_size=unit(load, layout))
    if load.max_num_batched_tokens is not None:
        return replace(config, max_num_batched_tokens=load.max_num_batched_tokens)
    return replace(config, max_num_batched_tokens=1 << 20) if load.model is None else config


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
    positions = unit(load, layout)
    fits = load.pool // positions * positions
    if fits < load.max_len:
        raise ConfigError(
            f"--pool {load.pool:,} holds {fits:,} positions in blocks of {positions}, less than one sequence of --max-len "
            f"{load.max_len:,}: raise --pool, or lower --max-len"
        )
    engine_config(load, layout)
    SamplingParams(n=load.n, beam_width=load.beam_width)
    if load.beam_width is not None and layout.allocator is not None:
        raise ConfigError("--beam-width works with --policy paged only: beams share memory, and contiguous memory can't be shared")
    most = (load.beam_width or 1) * -(-load.max_len // positions) * positions
    if most > fits:
        raise ConfigError(
            f"--beam-width {load.beam_width} beams of --max-len {load.max_len:,} tokens may need {most:,} positions together, but --pool "
            f"holds {fits:,}: raise --pool, or lower --max-len or --beam-width"
        )
    if layout.allocator is None:
        return
    run = ALLOCATORS[layout.allocator](load.pool // positions).largest_free_run * positions
    asked = max(reservation(layout.policy, r.prompt_tokens, r.output_tokens, load.max_len) for r in load.requests)
    if asked > run:
        raise ConfigError(
            f"--policy {layout.policy} reserves up to {asked:,} positions for a sequence, but the longest run that --allocator "
            f"{layout.allocator} can hand out of --pool {load.pool:,} is {run:,}: raise --pool, lower --max-len, or leave them out"
        )
