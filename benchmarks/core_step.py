"""Cost of the core: what the scheduler and the block manager take of a step in which every sequence decodes one token.

    python benchmarks/core_step.py [--steps 200]

The time is that of ``schedule`` and ``commit`` together, without the executor, which does nothing here: medians over the steps,
beside the slowest step in a hundred. Prompts differ, and their lengths are spread over a block, so that in every step one
sequence in 16 takes a new block and publishes the old one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams
from quire.simulator.devices import NoModel

BLOCK = 16


@dataclass
class Cost:
    """Milliseconds of a step."""

    median: float
    slowest: float
    """One step in a hundred takes longer."""


def measure(sequences: int, length: int, blocks: int, steps: int, waiting: int = 0) -> Cost:
    """``sequences`` of about ``length`` tokens in a pool of ``blocks``, while ``waiting`` requests are too long to start."""
    device = NoModel(blocks, BLOCK, blocks * BLOCK)
    config = EngineConfig(
        admission="watermark", max_num_seqs=min(sequences + waiting, blocks), max_num_batched_tokens=1 << 20, max_waiting=1 << 20
    )
    engine = Engine(device, config)
    at = 0
    for number in range(sequences):
        tokens = length + number % BLOCK
        engine.add(_request(number, at, tokens))
        at += tokens
    while any(seq.num_tokens - seq.num_computed > 1 for seq in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    free = engine.scheduler.manager.pool.num_free
    for number in range(sequences, sequences + waiting):
        engine.add(_request(number, at, free * BLOCK + 1))
        at += free * BLOCK + 1
    scheduler, times = engine.scheduler, []
    for step in range(steps + 8):
        start = perf_counter()
        plan = scheduler.schedule()
        scheduled = perf_counter()
        result = device.execute(plan)
        executed = perf_counter()
        scheduler.commit(plan, result)
        if step >= 8:
            times.append(1000 * (scheduled - start + perf_counter() - executed))
    assert sequences <= len(scheduler.running) <= sequences + 1, "the head of the queue may start early"
    return Cost(median(times), quantiles(times, n=100)[-1])


def _request(number: int, first_token: int, tokens: int) -> Request:
    return Request(str(number), list(range(first_token, first_token + tokens)), SamplingParams(max_tokens=None), number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps: int = parser.parse_args().steps

    def pool(sequences: int, length: int) -> int:
        """Just large enough."""
        return sequences * ((length + BLOCK + steps + 16) // BLOCK + 2) * 101 // 100

    few = 8
    cases = [
        ("few sequences", few, 100, 1_000, 0),
        ("few sequences, large pool", few, 100, 1_000_000, 0),
        ("the yardstick", 256, 1_000, pool(256, 1_000), 0),
        ("large pool", 256, 1_000, 1_000_000, 0),
        ("with a queue", 256, 1_000, pool(256, 1_000), 16),
        *((f"{n} sequences", n, 1_000, pool(n, 1_000), 0) for n in (64, 128, 512)),
        *((f"{length:,} tokens", 256, length, pool(256, length), 0) for length in (100, 10_000)),
    ]
    print(f"{'':27}{'sequences':>10}{'tokens':>8}{'blocks':>11}{'waiting':>9}{'median ms':>11}{'1 in 100':>10}{'µs/sequence':>13}")
    for name, sequences, length, blocks, waiting in cases:
        cost = measure(sequences, length, blocks, steps, waiting)
        print(f"{name:27}{sequences:10,}{length:8,}{blocks:11,}{waiting:9,}{cost.median:11.3f}{cost.slowest:10.3f}"
              f"{1000 * cost.median / sequences:13.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
