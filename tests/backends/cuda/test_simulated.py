"""The simulator decides what this backend's engine decides, whose steps overlap."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quire.backends.memory import kv_layout
from quire.config import EngineConfig
from quire.machine import GPUS
from quire.models.quantization import planned_cost
from quire.models.weights import load_spec, resolve_model
from quire.simulator.report import Goodput
from quire.simulator.simulate import Load, Server, execute, simulate
from quire.workload import Lengths, TraceRequest, arrive_at, draw_requests
from sample_models import QWEN2, write_model

WINDOWS = {**QWEN2, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3, "vocab_size": 4096}


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3}, {"admission": "no-evict"}, {"prefix_caching": False}])
def test_steps_and_memory_are_those_of_the_engine(options: dict[str, object], windows: bool, tmp_path: Path) -> None:
    """windows: two of three layers have one, and give blocks back."""
    model = resolve_model("embedded")
    if windows:
        write_model(tmp_path, WINDOWS)
        for file in model.glob("*tokenizer*"):
            shutil.copy(file, tmp_path)
        model = tmp_path
    spec = load_spec(model)
    layout = kv_layout(spec, 256, 16)
    assert layout.groups.width == (3 if windows else 1)
    config = replace(
        EngineConfig(
            str(model), device="torch-cpu", max_model_len=256, block_size=16, max_num_batched_tokens=64, max_num_seqs=8, dtype="float32"
        ),
        **options,
    )
    blocks = 80 if windows else 40
    config = replace(config, kv_memory=str(blocks * layout.block_bytes(config, spec)))
    lengths = Lengths(40, 0.8, 120)
    drawn = [*draw_requests(16, lengths, lengths), TraceRequest(None, 100, 9, (5,)), TraceRequest(None, 120, 9, (5,))]
    load, nothing = Load(arrive_at(drawn, float("inf"))), Goodput(())
    foretold = simulate(Server(config, blocks, 256, planned_cost(config, spec), layout.groups), GPUS["l4"], load, nothing)
    seen = execute(config, load, nothing)
    assert foretold.preemptions > 0 or options.get("admission") == "no-evict" or "max_num_seqs" in options, "the load fills the memory"
    assert [point[1:] for point in foretold.timeline] == [point[1:] for point in seen.timeline]
    for name in ("completed", "output_tokens", "cached_tokens", "steps", "preemptions", "tokens_recomputed", "kv_most"):
        assert getattr(foretold, name) == getattr(seen, name), name
