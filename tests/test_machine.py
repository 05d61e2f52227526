"""What a step takes on a machine, and machines as files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from quire.core.plan import RowWork, StepPlan
from quire.errors import ConfigError
from quire.machine import GPUS, Machine, StepCost
from quire.models.spec import ModelCost, RopeSpec, TransformerSpec

MACHINE = Machine("test", 1e9, 1e10, ((1.0, 0.5), (100.0, 1.0)), 0.5e9, 1e9, step_s=0.001, spread=0.1)


def test_the_longer_of_reading_and_computing_and_attention_after_it() -> None:
    reads = StepCost(linear_flops=10**9, weight_bytes=10**9, attention_flops=0, kv_bytes=0)
    assert MACHINE.seconds(reads) == pytest.approx(0.001 + 1.0 / 0.5), "a second of reading, of which half is reached"
    computes = StepCost(linear_flops=10**11, weight_bytes=10**8, attention_flops=10**9, kv_bytes=10**8)
    assert MACHINE.seconds(computes) == pytest.approx(0.001 + 10.0 + 1.0), "prompts' attention computes"
    assert MACHINE.attention_seconds(StepCost(1, 1, 10, 10**9)) == pytest.approx(2.0), "that of decoding reads"


def test_shares_between_the_points() -> None:
    def share(flops: int) -> float:
        return MACHINE.share(StepCost(flops, 10**6, 0, 0))

    assert share(10**5) == share(10**6) == 0.5
    assert share(10**7) == pytest.approx(0.75), "half-way in the logarithm"
    assert share(10**8) == share(10**10) == 1.0


def test_a_slower_machine() -> None:
    cost = StepCost(3 * 10**9, 10**8, 10**7, 10**7)
    assert MACHINE.slower(1.25).seconds(cost) == pytest.approx(1.25 * MACHINE.seconds(cost))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    machine = replace(MACHINE, memory=1 << 30, weights="int8", source="here")
    file.write_text(json.dumps({"machine": asdict(machine)}))
    assert Machine.load(str(file)) == machine


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "this is not JSON"),
        ("[1]", "holds no machine"),
        ('{"machine": {"name": "x"}}', "holds no machine"),
        ({"extra": 1}, "holds no machine"),
        ({"bytes_per_s": "fast"}, "is no number"),
        ({"bytes_per_s": -1}, "must be from 1e3 to 1e20"),
        ({"flops_per_s": 1e-300}, "must be from 1e3 to 1e20"),
        ({"reached": []}, "operations for a byte above 0"),
        ({"reached": [[1, float("nan")]]}, "shares from 0.001"),
        ({"reached": [[2, 1], [1, 1]]}, "must ascend"),
        ({"reached": [1, 2]}, "is no number"),
        ({"step_s": -1}, "step_s must be from 0"),
        ({"spread": 1e200}, "spread from 0 to 10"),
        ({"memory": -5}, "memory above 0"),
        ({"memory": float("inf")}, "is no number"),
    ],
)
def test_bad_files(text: str | dict[str, object], says: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text if isinstance(text, str) else json.dumps({"machine": asdict(MACHINE) | text}))
    with pytest.raises(ConfigError, match=says):
        Machine.load(str(file))


def test_a_name_that_is_no_file() -> None:
    with pytest.raises(ConfigError, match=r"is neither a file .* nor a device that is known by name: a10, .*h200"):
        Machine.load("h900")


LLAMA_8B = TransformerSpec("Llama", 128256, 4096, 32, 32, 8, 128, 14336, 8192, rope=RopeSpec(rotary_dim=128), dtype="bfloat16")
QWEN_06B = TransformerSpec("Qwen3", 151936, 1024, 28, 16, 8, 128, 3072, 8192, rope=RopeSpec(rotary_dim=128), tied=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("spec", "rows", "ms"),
    [(LLAMA_8B, 1, 4.21), (LLAMA_8B, 32, 5.68), (LLAMA_8B, 256, 15.74), (QWEN_06B, 1, 0.86), (QWEN_06B, 32, 2.17), (QWEN_06B, 256, 8.83)],
)
def test_an_h200_takes_what_was_measured(spec: TransformerSpec, rows: int, ms: float) -> None:
    """docs/benchmarks/cuda.md: steps at context 1,024."""
    head = 2 * spec.vocab_size * spec.hidden_size
    cost = ModelCost(spec, 2 * spec.matmul_parameters() + head, head, "bfloat16")
    step = StepPlan(work=[RowWork(row, 1024, 1, [], True) for row in range(rows)])
    h200 = GPUS["h200"]
    assert 1000 * h200.seconds(cost.of(step.extent())) == pytest.approx(ms, rel=h200.spread)


def test_known_gpus_are_machines_of_the_cuda_backend() -> None:
    for name, gpu in GPUS.items():
        assert gpu.device == "cuda", name
        assert gpu.memory is not None, name
        assert gpu.source, name
