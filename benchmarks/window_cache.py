"""What the cache holds of prompts where some layers have a window: groups of layers against one group, in pools of the same bytes.

Conversations of several turns behind a common beginning, in simulated time: the engine's own scheduler and block manager on a device that
computes nothing. docs/benchmarks/memory.md has the figures.
"""

from __future__ import annotations

import random

from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams
from quire.simulator.devices import NoModel

SIZE, CONTEXT = 16, 12_000
CONVERSATIONS, TURNS, AT_ONCE, COMMON = 60, 4, 8, 1500
MODELS = {"Gemma 3 4B": KVGroups(1, 6, 1024), "Gemma 3 1B": KVGroups(2, 11, 512), "gpt-oss": KVGroups(1, 1, 128)}


def found(groups: KVGroups, blocks: int) -> float:
    """Share of the prompts' positions that the cache held."""
    rng = random.Random(1)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(10**6) for _ in range(rng.randrange(low, high))]

    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=CONTEXT, speculation="off")
    engine = Engine(NoModel(blocks, SIZE, CONTEXT, groups), config)
    common = draw(COMMON, COMMON + 1)
    texts = [common + draw(100, 2000) for _ in range(CONVERSATIONS)]
    live = 0

    def step() -> None:
        nonlocal live
        for output in engine.step():
            texts[int(output.request_id.split("/")[1])] += output.token_ids
            live -= output.finish_reason is not None

    for turn in range(TURNS):
        for i in rng.sample(range(CONVERSATIONS), CONVERSATIONS):
            engine.add(Request(f"{turn}/{i}", list(texts[i]), SamplingParams(max_tokens=rng.randrange(50, 400)), i))
            live += 1
            while live >= AT_ONCE:
                step()
        while engine.has_work:
            step()
        for text in texts:
            text += draw(20, 150)
    counters = engine.scheduler.manager.counters
    return counters.hit_tokens / counters.prompt_tokens


def main() -> None:
    print("found in the cache, small, middle and large pools        one group        groups")
    for name, groups in MODELS.items():
        pools = [int(share * 19_500) * groups.full + groups.windowed * 64 * 20 for share in (0.25, 0.5, 1.0)]
        for blocks in pools:
            one, several = found(ONE_GROUP, blocks // groups.width), found(groups, blocks)
            what = f"{name:12} {groups.full} + {groups.windowed:2}, window {groups.window:5}, {blocks:6,} blocks"
            print(f"{what} {one:15.1%} {several:13.1%}")


if __name__ == "__main__":
    main()
