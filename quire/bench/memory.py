"""How much of a KV pool holds tokens: paged and contiguous memory, under the engine's own scheduler and block manager.

All requests are there from the start, and come in, in their order, as soon as the memory lets them. They enter the engine's
queue shortly before their turn, so that the tokens of a long trace need not be in memory. Without a model a step takes no time,
and a sequence ends at its length; the engine does not know that length, the reservations ``pow2`` and ``oracle`` do.

What is reported are means over steps (as in the PagedAttention paper, arXiv 2309.06180, Fig. 2), from the first step that
left a request waiting to the last one before the queue was empty: what a full pool looks like. A step is looked at when its
positions are written and nobody has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import perf_counter

from tqdm import tqdm

from quire.bench.memory_device import Device, open_device
from quire.bench.memory_load import ALLOCATORS, PAGED, Layout, Load, check
from quire.bench.memory_plot import MemoryRun, label
from quire.bench.memory_tally import Tally
from quire.core.contiguous import ContiguousManager, FirstCome, reservation
from quire.core.engine import Engine
from quire.core.sequence import Request, Sequence, derive_seed
from quire.sampling_params import SamplingParams
from quire.simulator.devices import Forced

QUEUE = 512
"""Sequences that wait in the engine: more requests come when there are fewer."""


class Result(MemoryRun):
    """One run, as ``--json`` writes it."""

    saved_share_in_step: float
    """``saved_share`` is between steps, as KVStats has it. In a step, those that fork have a block of their own to write."""
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


def run(load: Load, layout: Layout) -> Result:
    """Run ``load`` to its end under ``layout``. Raises as ``check``, and what opening a model raises."""
    check(load, layout)
    start = perf_counter()
    device = open_device(load, layout)
    outputs: dict[int, int] = {}  # a sequence's seed → tokens that it generates
    ends: dict[int, int] = {}  # → positions that it has computed at its end: all but the last token's
    forced = Forced(device.executor, outputs, device.eos[0])
    manager = None
    if layout.allocator is not None:
        allocator = ALLOCATORS[layout.allocator](forced.num_blocks)
        reserve = partial(_reserve, layout.policy, outputs, load.max_len)
        manager = ContiguousManager(allocator, forced.block_size, reserve)
    engine = Engine(forced, device.config, manager=manager, policy=FirstCome() if manager else None)
    tally = Tally(engine.scheduler, ends)
    forced.watch = tally.see

    steps = submitted = 0
    name, samples = layout.allocator or f"block {layout.block_size}", load.n * len(load.requests)
    with tqdm(total=samples, desc=f"{layout.policy} / {name}", unit="sample", delay=1, disable=None) as progress:
        while engine.has_work or tally.more:
            while tally.more and len(engine.scheduler.waiting) < QUEUE:
                work = load.requests[submitted]
                for index in range(load.n):
                    outputs[seed := derive_seed(submitted, index)] = work.output_tokens
                    ends[seed] = work.prompt_tokens + work.output_tokens - 1
                engine.add(_request(load, submitted, device))
                submitted += 1
                tally.more = submitted < len(load.requests)
            if ended := sum(output.finish_reason is not None for output in engine.step()):
                progress.update(ended)
            tally.see_between()
            steps += 1
    return _result(load, layout, engine, tally, steps, perf_counter() - start)


def notes(runs: list[Result]) -> list[str]:
    """What the table leaves out, a line each; for runs of one load."""
    first = runs[0]
    what = "requests" if first["n"] == 1 else f"requests of {first['n']} samples"
    beams = f", {first['beam_width']} beams" if first["beam_width"] else ""
    lines = [f"{first['requests']:,} {what}{beams}, {first['useful_tokens']:,} prompt and output tokens; a pool of "
             f"{first['pool_tokens']:,} positions; means over the steps with a full pool and a queue"]  # fmt: skip
    for run in runs:
        name = label(run)
        if run["recomputed_tokens"]:
            lines.append(f"{name}: computed {run['recomputed_per_useful']:.1%} of the tokens again, after preemptions")
        if not run["saturated"]:
            lines.append(f"{name}: no request ever waited for memory, and the means are over all steps: lower --pool, or raise --requests")
        elif run["limited_by_sequences"]:
            lines.append(f"{name}: requests waited because {run['max_sequences']:,} sequences ran, the most that --max-num-seqs allows")
    return lines


def _request(load: Load, number: int, device: Device) -> Request:
    """Its number is its seed: Forced knows its sequences by it."""
    work = load.requests[number]
    # The model may not end it before its length; then Forced does.
    params = SamplingParams(n=load.n, beam_width=load.beam_width, max_tokens=None, min_tokens=work.output_tokens - 1)
    return Request(str(number), device.prompt(work, number), params, number, device.eos)


def _reserve(policy: str, outputs: Mapping[int, int], max_len: int, seq: Sequence) -> int:
    return reservation(policy, seq.num_prompt, outputs[seq.seed], max_len)


def _result(load: Load, layout: Layout, engine: Engine, tally: Tally, steps: int, seconds: float) -> Result:
    manager = engine.scheduler.manager
    counters = manager.counters
    useful = sum(r.prompt_tokens + load.n * r.output_tokens for r in load.requests)
    positions, counted = max(1, tally.positions), max(1, tally.steps)
    return {
        "policy": layout.policy,
        "admission": load.admission if layout.policy == PAGED else None,
        "allocator": layout.allocator,
        "block_size": None if manager.block_size == 1 and layout.block_size is None else manager.block_size,
        "token_share": tally.tokens / positions,
        "reserved_share": tally.reserved / positions,
        "internal_share": (tally.owned - tally.tokens - tally.reserved) / positions,
        "external_share": 1 - tally.owned / positions,
        "mean_sequences": tally.sequences / counted,
        "preemptions": counters.preemptions,
        "recomputed_tokens": counters.tokens_recomputed,
        "hit_share": counters.hit_tokens / counters.prompt_tokens,
        "saved_share": tally.saved / counted,
        "saved_share_in_step": tally.saved_in_step / counted,
        "n": load.n,
        "beam_width": load.beam_width,
        "pool_tokens": manager.pool.num_blocks * manager.block_size,
        "requests": len(load.requests),
        "useful_tokens": useful,
        "recomputed_per_useful": counters.tokens_recomputed / useful,
        "steps": steps,
        "counted_steps": tally.steps,
        "saturated": tally.saturated,
        "limited_by_sequences": tally.limited_by_rows,
        "max_sequences": tally.max_sequences,
        "seconds": seconds,
    }
