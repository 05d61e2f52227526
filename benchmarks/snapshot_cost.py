"""What watching costs the engine: CPU time of one snapshot (core/snapshot.py) and its encoding, in full pools with 64 running and 32
waiting sequences of about 1,500 tokens. The page and ``quire top`` ask for at most four a second.

    python benchmarks/snapshot_cost.py
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams
from quire.server.engine.messages import Seen, encode
from quire.server.page.feed import LOOK_S
from quire.simulator.devices import NoModel

POOLS = (10_000, 50_000)
REPEATS = 200
RUNNING = 64
VOCABULARY = 1000


def full(num_blocks: int) -> Engine:
    """An engine whose every block is owned or cached."""
    rng = random.Random(2)
    config = EngineConfig(max_num_seqs=RUNNING, max_num_batched_tokens=8192, max_waiting=1 << 20, admission="watermark", speculation="off")
    engine = Engine(NoModel(num_blocks, 16, 2048), config, time.monotonic)

    def ask(name: str, length: int, max_tokens: int) -> None:
        engine.add(Request(name, [rng.randrange(VOCABULARY) for _ in range(length)], SamplingParams(max_tokens=max_tokens), 0))

    for i in range(num_blocks // 60):
        ask(str(i), 1000, 1)
    while engine.has_work:
        engine.step()
    for i in range(RUNNING + 32):
        ask(f"cmpl-0123456789abcdef01234567-{i}", 1500, 500)
    while len(engine.scheduler.running) < RUNNING or any(s.num_computed < s.num_prompt for s in engine.scheduler.running):
        engine.step()
    return engine


def cost_s(work: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(REPEATS):
        work()
    return (time.thread_time() - start) / REPEATS


def main() -> None:
    for num_blocks in POOLS:
        engine = full(num_blocks)
        watch = engine.watch()
        seen = Seen(0, watch.snapshot(), 0.0)
        snapshot, encoding = cost_s(watch.snapshot), cost_s(lambda seen=seen: encode(seen))  # type: ignore[misc]
        print(
            f"{num_blocks:,} blocks: snapshot {snapshot * 1e6:.0f} us, encoding {encoding * 1e6:.0f} us ({len(encode(seen)):,} bytes), "
            f"{100 * (snapshot + encoding) / LOOK_S:.2f} % of the time at one in {LOOK_S:g} s"
        )


if __name__ == "__main__":
    main()
