"""The simulator decides what this backend's engine decides, whose steps overlap."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quire.config import EngineConfig
from quire.machine import GPUS
from quire.models.quantization import planned_cost
from quire.models.weights import load_spec, resolve_model
from quire.simulator.report import Goodput
from quire.simulator.simulate import Load, Server, execute, simulate
from quire.workload import Lengths, TraceRequest, arrive_at, draw_requests


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3}, {"admission": "no-evict"}, {"prefix_caching": False}])
def test_steps_and_memory_are_those_of_the_engine(options: dict[str, object]) -> None:
    spec, blocks = load_spec(resolve_model("embedded")), 40
    config = replace(
        EngineConfig(device="torch-cpu", max_model_len=256, block_size=16, max_num_batched_tokens=64, max_num_seqs=8, dtype="float32"),
        **options,
    )
    config = replace(config, kv_memory=str(blocks * 16 * spec.kv_bytes_per_token("float32")))
    lengths = Lengths(40, 0.8, 120)
    drawn = [*draw_requests(16, lengths, lengths), TraceRequest(None, 100, 9, (5,)), TraceRequest(None, 120, 9, (5,))]
    load, nothing = Load(arrive_at(drawn, float("inf"))), Goodput(())
    foretold = simulate(Server(config, blocks, 256, planned_cost(config, spec)), GPUS["l4"], load, nothing)
    seen = execute(config, load, nothing)
    assert foretold.preemptions > 0 or options.get("admission") == "no-evict" or "max_num_seqs" in options, "the load fills the memory"
    assert [point[1:] for point in foretold.timeline] == [point[1:] for point in seen.timeline]
    for name in ("completed", "output_tokens", "cached_tokens", "steps", "preemptions", "tokens_recomputed", "kv_most"):
        assert getattr(foretold, name) == getattr(seen, name), name
