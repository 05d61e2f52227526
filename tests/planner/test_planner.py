"""Plans against known figures, against what an engine really opens, and against the simulator."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from quire.backends.memory import GPU_CONTEXT, GPU_SHARE
from quire.config import EngineConfig
from quire.errors import CapacityError, ConfigError
from quire.llm import LLM
from quire.machine import GPUS, Machine
from quire.models.quantization import planned_cost
from quire.models.spec import RopeSpec, TransformerSpec
from quire.models.weights import load_spec, resolve_model
from quire.planner.describe import describe, table
from quire.planner.plan import Demand, alternatives, plan
from quire.simulator.report import Goodput
from quire.simulator.simulate import Load, Server, simulate
from quire.workload import TraceRequest

LLAMA_8B = TransformerSpec("Llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072, rope=RopeSpec(rotary_dim=128), dtype="bfloat16")
MIXTURE = replace(
    LLAMA_8B, intermediate_size=1024, num_experts=16, experts_per_token=2, expert_correction=True, shared_size=2048,
    dense_sizes=(8192, *[0] * 31),
)  # fmt: skip
SMALL = TransformerSpec("Llama", 32000, 768, 12, 12, 12, 64, 2048, 2048, rope=RopeSpec(rotary_dim=64))
CPU = Machine("a CPU", 30e9, 400e9, ((0.5, 0.9), (13.0, 0.7), (100.0, 0.8)), 20e9, 200e9, step_s=3e-4, memory=16 << 30, spread=0.2)
DEMAND = Demand(512, 256)


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "kv_bytes"),
    # Configurations of published models: Qwen3-8B, Qwen3-14B, Llama-3.1-8B.
    [(36, 32, 8, 147_456), (40, 40, 8, 163_840), (32, 32, 8, 131_072)],
)
def test_kv_of_known_models(layers: int, heads: int, kv_heads: int, kv_bytes: int) -> None:
    spec = TransformerSpec("X", 1000, 4096, layers, heads, kv_heads, 128, 12288, 40960, rope=RopeSpec(rotary_dim=128), dtype="bfloat16")
    assert plan(EngineConfig(max_model_len=4096), spec, CPU, DEMAND).kv_per_token == kv_bytes


def test_llama_8b_on_an_h100() -> None:
    config = EngineConfig(device="cuda", max_model_len=8192)
    found = plan(config, LLAMA_8B, GPUS["h100"], DEMAND)
    assert found.misfit is None
    assert found.parameters == 8_030_261_248, "as published, 8.03 billion"
    assert found.weights == 2 * found.parameters
    assert found.kv_per_token == 128 << 10
    memory = GPUS["h100"].memory
    assert memory is not None
    assert found.available == memory - GPU_CONTEXT
    assert found.pool <= GPU_SHARE * (found.available - found.weights - found.buffers) < found.pool + 64 * found.kv_per_token
    assert found.num_blocks * found.block_size * found.kv_per_token == found.pool
    assert found.full_length == found.num_blocks // (8192 // 64)


def test_two_gpus_have_half_of_it_each() -> None:
    config = EngineConfig(device="cuda", max_model_len=8192)
    one, two = (plan(replace(config, tensor_parallel=n), LLAMA_8B, GPUS["h100"], DEMAND) for n in (1, 2))
    assert two.kv_per_token == one.kv_per_token // 2
    assert one.weights / 2 < two.weights < 0.54 * one.weights, "the embedding is whole"
    assert two.parameters == one.parameters
    assert two.typical >= one.typical


@pytest.mark.parametrize(
    "options", [{}, {"kv_dtype": "int8"}, {"quantize": "int8"}, {"quantize": "int4", "block_size": 32}, {"kv_dtype": "float32"}]
)
def test_the_engine_opens_what_was_planned(options: dict[str, object]) -> None:
    pytest.importorskip("quire.backends.cpu._native")
    config = EngineConfig(kv_memory="24MiB", max_model_len=512, **options)  # type: ignore[arg-type]
    spec = load_spec(resolve_model("embedded"))
    found = plan(config, spec, replace(CPU, memory=None), Demand())
    llm = LLM.from_config(config)
    assert found.num_blocks == llm.backend.num_blocks
    assert planned_cost(config, spec) == llm.cost(), "bytes that a step reads, to the byte"


def test_what_does_not_fit_is_said_as_the_server_says_it() -> None:
    spec = load_spec(resolve_model("embedded"))
    config = EngineConfig(kv_memory="1MiB")
    found = plan(config, spec, CPU, DEMAND)
    with pytest.raises(CapacityError) as e:
        LLM.from_config(config)
    assert found.misfit == e.value.message
    assert 0 < found.max_model_len < spec.max_positions
    assert found.max_model_len == found.num_blocks * 16, "what would fit"
    assert plan(replace(config, max_model_len=found.max_model_len), spec, CPU, Demand()).misfit is None
    shown = describe(found, config, spec, CPU, DEMAND, None)
    assert "does not fit --kv-memory 1MiB holds" in shown
    assert f"with --max-model-len {found.max_model_len}:" in shown


def test_a_model_that_is_larger_than_the_machine() -> None:
    found = plan(EngineConfig(max_model_len=2048), LLAMA_8B, replace(CPU, memory=8 << 30), DEMAND)
    assert found.misfit is not None
    assert "take a smaller model" in found.misfit
    assert found.num_blocks == 0
    assert "does not fit" in table([("x", found)], "widths")
    shown = describe(found, EngineConfig(max_model_len=2048), LLAMA_8B, CPU, DEMAND, 1.0)
    assert "capacity" not in shown, "no speed of what can't run"
    assert "tokens/s" not in shown


def test_blocks_of_a_sequence_over_its_life() -> None:
    found = plan(EngineConfig(), SMALL, CPU, Demand(100, 300))
    each = sum(math.ceil((100 + done) / 16) for done in range(1, 301)) / 300
    assert found.blocks_each == pytest.approx(each, rel=0.02)
    assert found.typical == min(64, int(found.num_blocks / found.blocks_each))


def test_memory_for_so_many_people() -> None:
    found = plan(EngineConfig(), SMALL, CPU, Demand(1000, 500, sequences=10))
    assert found.needed == 10 * 94 * 16 * SMALL.kv_bytes_per_token("float16")
    again = plan(EngineConfig(kv_memory=str(found.needed), max_model_len=1500), SMALL, CPU, Demand(1000, 500, sequences=10))
    assert again.full_length == 10


@pytest.mark.parametrize("sequences", [1, 3, 20])
def test_memory_where_some_layers_have_a_window(sequences: int) -> None:
    """What is said to be needed is enough, and less than it would be if all layers kept everything."""
    mixed, demand = replace(SMALL, windows=(0,) + (64,) * (SMALL.num_layers - 1)), Demand(1000, 500, sequences=sequences)
    config = EngineConfig(max_num_batched_tokens=256, max_model_len=1500)
    found, all_ = (plan(config, spec, CPU, demand) for spec in (mixed, SMALL))
    assert found.needed is not None
    assert all_.needed is not None
    assert found.needed < 0.6 * all_.needed
    again = plan(replace(config, kv_memory=str(found.needed)), mixed, CPU, demand)
    assert again.misfit is None
    assert again.full_length >= sequences
    assert "of one sequence (of which layers with a window keep what it holds)" in describe(found, config, mixed, CPU, demand, None)
    alone, all_alone = (made.prompts[-1].seconds for made in (found, all_))
    assert alone < all_alone, "its attention takes less time, too"


@pytest.mark.parametrize(("prompt", "output", "sequences"), [(500, 200, 8), (100, 400, 32), (1500, 50, 4), (300, 300, 1)])
def test_capacity_is_what_the_simulator_finds(prompt: int, output: int, sequences: int) -> None:
    """As many clients as sequences, who ask again at once."""
    config, demand = EngineConfig(max_num_seqs=sequences), Demand(prompt, output, sequences)
    found = plan(config, SMALL, CPU, demand)
    server = Server(config, found.num_blocks, 2048, planned_cost(config, SMALL))
    many = [TraceRequest(None, prompt, output)] * (8 * sequences)
    seen = simulate(server, CPU, Load(many, concurrency=sequences), Goodput(()))
    assert found.requests_per_s == pytest.approx(seen.requests_per_s, rel=0.15)
    alone = simulate(server, CPU, Load(many[:1]), Goodput(()))
    assert plan(config, SMALL, CPU, Demand(prompt, output, 1)).first_token_s == pytest.approx(alone.latencies["ttft"]["mean"], rel=0.01)


def test_other_widths() -> None:
    named = dict(alternatives(EngineConfig(), SMALL, {"": CPU, "int8": CPU, "int4": CPU}, DEMAND))
    assert list(named) == [
        "float32, KV float16",
        "float32, KV int8",
        "int8, KV float16",
        "int8, KV int8",
        "int4, KV float16",
        "int4, KV int8",
    ]
    weights = [p.weights for p in named.values()]
    assert weights == sorted(weights, reverse=True)
    assert named["float32, KV int8"].num_blocks > 1.8 * named["float32, KV float16"].num_blocks
    uneven = replace(SMALL, intermediate_size=2000)
    assert not any(name.startswith("int4") for name, _ in alternatives(EngineConfig(), uneven, {"": CPU, "int4": CPU}, DEMAND))
    with pytest.raises(ConfigError, match="does not divide"):
        plan(EngineConfig(quantize="int4"), uneven, CPU, DEMAND)


def test_a_mixture_is_described() -> None:
    config = EngineConfig(max_model_len=2048)
    shown = describe(plan(config, MIXTURE, CPU, DEMAND), config, MIXTURE, CPU, DEMAND, None)
    assert "(2 of 16 experts and a shared feed-forward for a token in 31 of 32 layers)" in shown


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("whole", [LLAMA_8B, MIXTURE], ids=["", "mixture"])
def test_a_part_of_a_model_is_what_it_is_divided_into(whole: TransformerSpec, size: int, tied: bool) -> None:
    parallel = pytest.importorskip("quire.backends.cuda.parallel")
    spec = replace(whole, tied=tied)
    nothing = np.zeros(1, np.float16)
    tensors = {name: np.lib.stride_tricks.as_strided(nothing, shape, (0,) * len(shape)) for name, shape in spec.tensor_shapes().items()}
    _, kept = parallel.shard(spec, tensors, 0, size)
    config = EngineConfig(device="cuda", tensor_parallel=size, max_model_len=8192)
    assert plan(config, spec, GPUS["h200"], DEMAND).weights == 2 * sum(tensor.size for tensor in kept.values())
    read = 2 * sum(tensor.size for name, tensor in kept.items() if tensor.ndim == 2 and name != "embed.weight")
    assert planned_cost(config, spec).weight_bytes == read


def test_lengths_that_do_not_fit_are_refused_and_defaults_fit() -> None:
    config = EngineConfig(max_model_len=300)
    with pytest.raises(ConfigError, match=r"--prompt 200 \+ --output 150 > context of 300 tokens"):
        plan(config, SMALL, CPU, Demand(200, 150))
    with pytest.raises(ConfigError, match="context of 300"):
        plan(config, SMALL, CPU, Demand(300))
    found = plan(config, SMALL, CPU, Demand())
    assert found.prompt + found.output <= 300
    assert plan(config, SMALL, CPU, Demand(output=290)).prompt == 10
    assert plan(EngineConfig(max_model_len=2), SMALL, CPU, Demand()).output == 1
    assert (plan(EngineConfig(), SMALL, CPU, Demand()).prompt, plan(EngineConfig(), SMALL, CPU, Demand()).output) == (512, 256)


def test_the_memory_that_is_named_does() -> None:
    config, demand = EngineConfig(device="cuda"), Demand(512, 256, 100)
    shown = describe(plan(config, LLAMA_8B, GPUS["h200"], demand), config, LLAMA_8B, GPUS["h200"], demand, None)
    options = dict(
        re.findall(r"--(kv-memory|max-model-len|max-num-seqs) (\w+)", next(s for s in shown.splitlines() if s.startswith("needed")))
    )
    stated = EngineConfig(
        device="cuda",
        kv_memory=options["kv-memory"],
        max_model_len=int(options["max-model-len"]),
        max_num_seqs=int(options["max-num-seqs"]),
    )
    again = plan(stated, LLAMA_8B, GPUS["h200"], demand)
    assert again.misfit is None
    assert again.full_length == 100
    many = Demand(512, 256, 100_000)
    assert "by several servers" in describe(plan(config, LLAMA_8B, GPUS["h200"], many), config, LLAMA_8B, GPUS["h200"], many, None)


@pytest.mark.parametrize("sequences", [1, None])
def test_what_would_fit_is_what_the_server_says_would(sequences: int | None) -> None:
    config = EngineConfig(device="cuda", max_num_seqs=sequences)
    found = plan(config, LLAMA_8B, GPUS["l4"], DEMAND)
    assert found.misfit is not None
    assert f"lower --max-model-len to at most {found.max_model_len:,}" in found.misfit


def test_blocks_that_have_left_a_window_are_nobodys() -> None:
    windowed = replace(SMALL, windows=(64,) * SMALL.num_layers)
    all_, some = (plan(EngineConfig(), spec, CPU, Demand(1000, 500)) for spec in (SMALL, windowed))
    assert some.blocks_each == 5
    assert some.typical >= all_.typical
    assert some.full_length > all_.full_length


@pytest.mark.parametrize("values", [(0, 1, None), (1, 0, None), (1, 1, 0), (1, 10**10, None)])
def test_bad_demands(values: tuple[int, int, int | None]) -> None:
    with pytest.raises(ConfigError, match="must be from 1 to 1,000,000,000"):
        Demand(*values)
